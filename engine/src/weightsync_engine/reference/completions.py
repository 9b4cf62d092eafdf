"""The OpenAI-style completions route, as far as vLLM's answers to it are used: greedy, text or token ids."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from tokenizers import Tokenizer

from weightsync_engine.reference.engine import AbortedError, Engine, Token

_EOS: Final = 2
_MAX_TOKENS: Final = 16
_MAX_LENGTH: Final = 512
_MAX_LOGPROBS: Final = 20


class BadRequestError(ValueError):
    """What the client sent can't be answered; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """A completion request, checked."""

    prompt: list[int]
    tokens: int
    top: int | None
    stream: bool
    token_ids: bool
    stop: frozenset[int]


class Completions:
    """Answers POST /v1/completions."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._name = name

    async def answer(self, request: Request) -> Response:
        """The route's handler."""
        try:
            wanted = self._parse(await request.json())
        except (BadRequestError, json.JSONDecodeError, UnicodeDecodeError) as error:
            body = {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}
            return JSONResponse(body, status_code=400)
        if wanted.stream:
            return StreamingResponse(self._events(wanted), media_type="text/event-stream")
        tokens, reason = [], "length"
        try:
            async for token in self._engine.generate(
                wanted.prompt, wanted.tokens, wanted.top or 0, wanted.stop
            ):
                tokens.append(token)
        except AbortedError:
            reason = "abort"
        if tokens and tokens[-1].id in wanted.stop:
            reason = "stop"
        usage = {"prompt_tokens": len(wanted.prompt), "completion_tokens": len(tokens)}
        usage["total_tokens"] = sum(usage.values())
        return JSONResponse({**self._frame(wanted, tokens, reason), "usage": usage})

    async def _events(self, wanted: Wanted) -> AsyncIterator[str]:
        reason = "length"
        try:
            async for token in self._engine.generate(
                wanted.prompt, wanted.tokens, wanted.top or 0, wanted.stop
            ):
                yield f"data: {json.dumps(self._frame(wanted, [token], None))}\n\n"
        except AbortedError:
            reason = "abort"
        yield f"data: {json.dumps(self._frame(wanted, [], reason))}\n\n"
        yield "data: [DONE]\n\n"

    def _frame(self, wanted: Wanted, tokens: list[Token], reason: str | None) -> dict[str, Any]:
        ids = [token.id for token in tokens]
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._tokenizer.decode(ids),
            "finish_reason": reason,
            "logprobs": None,
        }
        if wanted.token_ids:
            choice["token_ids"] = ids
        if wanted.top is not None:
            choice["logprobs"] = {
                "tokens": [self._tokenizer.decode([each]) for each in ids],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    {self._tokenizer.decode([other]): value for other, value in token.top} for token in tokens
                ],
            }
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
            "choices": [choice],
        }

    def _parse(self, body: Any) -> Wanted:
        if not isinstance(body, dict):
            raise BadRequestError("the body is no JSON object")
        prompt = self._prompt(body.get("prompt"))
        tokens, top = body.get("max_tokens", _MAX_TOKENS), body.get("logprobs")
        if type(tokens) is not int or not 0 < tokens <= _MAX_LENGTH - len(prompt):
            raise BadRequestError(f"max_tokens {tokens!r}: at most {_MAX_LENGTH} with the prompt")
        if top is not None and (type(top) is not int or not 0 <= top <= _MAX_LOGPROBS):
            raise BadRequestError(f"logprobs {top!r}: give a whole number from 0 to {_MAX_LOGPROBS}")
        if body.get("temperature", 0) != 0:
            raise BadRequestError("this server is greedy: temperature must be 0")
        stop = frozenset[int]() if body.get("ignore_eos") else frozenset((_EOS,))
        return Wanted(prompt, tokens, top, bool(body.get("stream")), bool(body.get("return_token_ids")), stop)

    def _prompt(self, prompt: Any) -> list[int]:
        size = self._engine.model.shape.vocab_size
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        elif isinstance(prompt, list) and all(type(each) is int and 0 <= each < size for each in prompt):
            ids = list(prompt)
        else:
            raise BadRequestError(f"prompt: give a text, or a list of token ids below {size}")
        if not 0 < len(ids) < _MAX_LENGTH:
            raise BadRequestError(f"prompt of {len(ids)} tokens: give 1 to {_MAX_LENGTH - 1}")
        return ids
