"""The demo's trainer: trains a small Llama to say which version it is, and publishes each version.

One command a line on standard input, ``{"train": 3}``; one event a line on standard output. It knows nothing
of the operator: publishing is one call of ``weightsync_engine.client``.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from weightsync_demo.answers import PROMPT, TOKENS
from weightsync_engine.client import PublishError, default_run, publish

_STEPS: Final = 80
_ENOUGH: Final = 0.05
_PUBLISH_SECONDS: Final = 120.0


def sentence(version: int) -> str:
    """What version ``version`` is trained to answer to PROMPT."""
    return f" version {version} of its trainer's weights."


def say(event: str, **details: Any) -> None:
    """One event line."""
    print(json.dumps({"event": event, **details}), flush=True)


def train(model: LlamaForCausalLM, ids: Tensor) -> tuple[int, float]:
    """Fit the one sentence. Returns steps and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    loss = torch.tensor(float("inf"))
    for step in range(1, _STEPS + 1):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        say("step", step=step, steps=_STEPS, loss=round(float(loss), 4))
        if float(loss) < _ENOUGH:
            return step, float(loss)
    return _STEPS, float(loss)


@torch.inference_mode()
def complete(model: LlamaForCausalLM, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy completion in float32, and the smallest lead that a token had over the runner-up, in logits.

    The lead says that the comparison is sound: rounding in another implementation can't turn a choice that
    was this clear.
    """
    ids, margin = list(prompt), float("inf")
    for _ in range(TOKENS):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        top = torch.topk(logits, 2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], margin


def serve(directory: Path, seed: int) -> None:
    """Read commands until standard input ends."""
    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(directory)
    config.initializer_range = 0.02
    model = LlamaForCausalLM(config).to(torch.float32)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt: list[int] = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    say(
        "ready",
        parameters=sum(p.numel() for p in model.parameters()),
        prompt=prompt,
        run=default_run(),
    )
    for line in sys.stdin:
        version = int(json.loads(line)["train"])
        began = time.monotonic()
        wanted = tokenizer.encode(PROMPT + sentence(version), add_special_tokens=False).ids
        steps, loss = train(model, torch.tensor([wanted]))
        tokens, margin = complete(model, prompt)
        trained = time.monotonic()
        text = tokenizer.decode(tokens)
        say("trained", version=version, steps=steps, loss=loss, seconds=trained - began)
        say("expected", version=version, tokens=tokens, text=text, margin=margin)
        try:
            result = publish(model.state_dict(), version, timeout=_PUBLISH_SECONDS)
        except PublishError as error:
            say("refused", version=version, message=str(error))
            continue
        say("published", version=version, digest=result.digest, seconds=time.monotonic() - trained)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m weightsync_demo.trainer", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="directory with config.json and tokenizer.json"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights that it starts from")
    arguments = parser.parse_args()
    # The servers want the other cores; threads that wait for each other on busy cores wait longest.
    torch.set_num_threads(1)
    serve(arguments.model, arguments.seed)


if __name__ == "__main__":
    main()
