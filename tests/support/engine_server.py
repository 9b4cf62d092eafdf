"""Runs an engine (real vLLM or the reference engine) and talks to it as users do."""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from weightsync_contract.messages import VersionId
from weightsync_demo.engines import SERVED_MODEL, engine_process
from weightsync_engine.permit import Mode, Permit, write_permit
from weightsync_engine.worker.client import UnreachableError, WorkerClient
from weightsync_engine.worker.sockets import rank_sockets

TOKEN = "a-token-that-only-the-agent-has"
START_SECONDS = 240.0
PROMPT = (72, 101, 80, 115, 90, 33)


def need_vllm() -> None:
    """Skip without vLLM, fail in CI."""
    if find_spec("vllm") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("vLLM is not installed: make setup")
        pytest.skip("vLLM is not installed: make setup")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def tokens(self) -> list[int]:
        return list(self.body["choices"][0]["token_ids"])

    @property
    def logprobs(self) -> list[float]:
        return list(self.body["choices"][0]["logprobs"]["token_logprobs"])

    @property
    def finish(self) -> str:
        return str(self.body["choices"][0]["finish_reason"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def completion(tokens: int = 12, prompt: tuple[int, ...] = PROMPT, **more: Any) -> dict[str, Any]:
    return {
        "model": SERVED_MODEL,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


class EngineServer:
    """One engine in a directory of its own."""

    def __init__(self, kind: str, model: Path, directory: Path, ranks: int = 1, *arguments: str) -> None:
        self.kind = kind
        self.ranks = ranks
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory / "run"
        self.directory.mkdir(parents=True, exist_ok=True)
        token = self.directory / "control-token"
        token.touch(mode=0o600)
        token.write_text(TOKEN)
        self.process = engine_process(
            kind,
            model,
            self.port,
            self.directory,
            directory / f"{kind}.log",
            ranks=ranks,
            arguments=arguments,
        )
        self.boot = ""

    def start(self) -> None:
        """Start it and wait until it and its ranks answer."""
        self.process.start()
        until = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.alive, f"{self.kind} ended:\n{self.process.tail(40)}"
            assert time.monotonic() < until, f"{self.kind} did not start:\n{self.process.tail(40)}"
            time.sleep(0.1)
        self.boot = self.worker(0).hello().boot

    def _answers(self) -> bool:
        try:
            if self.request("GET", "/health", seconds=5).status != 200:
                return False
            for rank in range(self.ranks):
                self.worker(rank).hello()
        except (OSError, http.client.HTTPException, UnreachableError, KeyError):
            return False
        return True

    def ended(self, seconds: float = 15.0) -> bool:
        """Wait until its first process has ended."""
        until = time.monotonic() + seconds
        while self.process.alive:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def stop(self) -> None:
        self.process.stop(3)

    def worker(self, rank: int) -> WorkerClient:
        return WorkerClient(rank_sockets(self.directory)[rank], 10.0)

    def permit(self, mode: Mode | None, version: int | None = None, boot: str = "") -> None:
        """Write the permit as an agent would; None takes it away."""
        served = VersionId("run-a", version) if version is not None else None
        write_permit(self.directory / "permit", Permit(boot or self.boot, mode, served) if mode else None)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        seconds: float = 60.0,
    ) -> Answer:
        """One request, without a token unless given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            data = json.dumps(body) if body is not None else None
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        try:
            document = json.loads(raw) if raw else None
        except ValueError:
            document = raw.decode(errors="replace")
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, document)

    def control(self, method: str, path: str, body: Any = None, seconds: float = 60.0) -> Answer:
        """One request with the agent's token."""
        return self.request(method, path, body, {"authorization": f"Bearer {TOKEN}"}, seconds)

    def complete(self, tokens: int = 12, prompt: tuple[int, ...] = PROMPT, **more: Any) -> Answer:
        """Greedy completion of a prompt."""
        return self.request("POST", "/v1/completions", completion(tokens, prompt, **more))


def tokens_of(model: Path, home: Path, *arguments: str) -> list[int]:
    """What a reference engine answers that was started from a checkpoint."""
    server = EngineServer("reference", model, home, 1, *arguments)
    try:
        server.start()
        server.permit(Mode.SERVE)
        return server.complete().tokens
    finally:
        server.stop()


@dataclass
class Stream:
    """A streamed completion, read on a thread."""

    server: EngineServer
    tokens: int
    got: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 0
    finish: str | None = None
    error: str = ""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Comments, and how many tokens had come before them."""

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for(self, count: int, seconds: float = 60.0) -> None:
        """Until ``count`` tokens have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.got) >= count or self.error, seconds), self.got
            assert not self.error, self.error

    def join(self, seconds: float = 60.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the stream did not end: {len(self.got)} tokens"

    def _run(self) -> None:
        try:
            self._read()
        except (OSError, http.client.HTTPException) as error:
            with self._changed:
                self.error = repr(error)
                self._changed.notify_all()

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        body = json.dumps(completion(self.tokens, stream=True))
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        self.status, self.headers = response.status, {k.lower(): v for k, v in response.getheaders()}
        for event in self._events(response):
            choice = event["choices"][0]
            with self._changed:
                self.got += choice["token_ids"]
                self.finish = choice["finish_reason"]
                self._changed.notify_all()
        connection.close()

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Any]:
        while line := response.readline():
            text = line.decode().strip()
            if text == "data: [DONE]":
                return
            if text.startswith(":"):
                self.marks.append((len(self.got), text))
            if text.startswith("data: "):
                yield json.loads(text.removeprefix("data: "))
