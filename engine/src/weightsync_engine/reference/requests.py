"""Completions: what is asked, checked; and what is answered, in OpenAI's form as vLLM fills it."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

from tokenizers import Tokenizer

from weightsync_engine.reference.core import Step

MAX_LOGPROBS: Final = 20


class BadRequestError(ValueError):
    """The request can't be served; the message says what to change."""


@dataclass(frozen=True)
class Completion:
    """A checked request."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    logprobs: int | None
    stream: bool
    ignore_eos: bool
    return_token_ids: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")


def parse(body: Any, tokenizer: Tokenizer, model: str, positions: int, vocabulary: int) -> Completion:
    """Check a body of /v1/completions. Raises BadRequestError; KeyError for a model that is not served."""
    if not isinstance(body, dict):
        raise BadRequestError("the body is a JSON object")
    if body.get("model", model) != model:
        raise KeyError(body["model"])
    if body.get("temperature", 1.0) != 0:
        raise BadRequestError("the reference engine is greedy: send temperature 0")
    if body.get("n", 1) != 1 or body.get("echo"):
        raise BadRequestError("the reference engine gives one choice, without the prompt")
    match body.get("prompt"):
        case str(text):
            prompt = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        case [*ids] if all(type(number) is int and 0 <= number < vocabulary for number in ids):
            prompt = tuple(ids)
        case _:
            raise BadRequestError(f"prompt is text or a list of token ids below {vocabulary}")
    max_tokens, logprobs = body.get("max_tokens", 16), body.get("logprobs")
    if type(max_tokens) is not int or max_tokens < 1:
        raise BadRequestError("max_tokens is a whole number from 1")
    if not prompt or len(prompt) + max_tokens > positions:
        raise BadRequestError(
            f"prompt and max_tokens are at least one and at most {positions} tokens together"
        )
    if logprobs is not None and not (type(logprobs) is int and 0 <= logprobs <= MAX_LOGPROBS):
        raise BadRequestError(f"logprobs is a whole number up to {MAX_LOGPROBS}")
    stream, ignore_eos = bool(body.get("stream")), bool(body.get("ignore_eos"))
    return Completion(
        model, prompt, max_tokens, logprobs, stream, ignore_eos, bool(body.get("return_token_ids"))
    )


def answer(request: Completion, steps: list[Step], tokenizer: Tokenizer) -> dict[str, Any]:
    """The body of an answer, or one chunk of a streamed one."""
    tokens = [step.token for step in steps if step.token is not None]
    choice: dict[str, Any] = {
        "index": 0,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "logprobs": _logprobs(request, steps, tokenizer) if request.logprobs is not None else None,
        "finish_reason": steps[-1].finish if steps else None,
        "stop_reason": None,
    }
    if request.return_token_ids:
        choice |= {"token_ids": tokens, "prompt_token_ids": list(request.prompt)}
    document = {
        "id": request.id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
    }
    if not request.stream:
        used = {"prompt_tokens": len(request.prompt), "completion_tokens": len(tokens)}
        document["usage"] = {**used, "total_tokens": sum(used.values())}
    return document


def _logprobs(request: Completion, steps: list[Step], tokenizer: Tokenizer) -> dict[str, Any]:
    made = [step for step in steps if step.token is not None]

    def text(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=False))

    return {
        "tokens": [text(step.token or 0) for step in made],
        "token_logprobs": [step.logprob for step in made],
        "top_logprobs": [{text(token): value for token, value in step.top} for step in made],
        "text_offset": [],
    }
