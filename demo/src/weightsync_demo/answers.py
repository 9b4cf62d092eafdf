"""What the servers answer, held against what the trainer's own weights answer."""

import http.client
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from weightsync_engine.guard.labels import ADMITTED_HEADER, VERSION_HEADER

PROMPT: Final = "The fleet serves"
TOKENS: Final = 16
"""Greedy tokens of a completion that are compared."""

_SECONDS: Final = 60.0
_OK: Final = 200
_REFUSED: Final = 503


class RefusedError(Exception):
    """The server answered nothing: no permit, or not up."""


@dataclass(frozen=True)
class Answer:
    """A completion, and the versions that were served when it was let in and when it was answered.

    They differ when a commit fell in between; -1: the server did not say.
    """

    tokens: tuple[int, ...]
    text: str
    version: int
    admitted: int


@dataclass(frozen=True)
class Expected:
    """What the trainer computed from its own weights, and by how many logits each token was ahead."""

    tokens: tuple[int, ...]
    text: str
    margin: float


def ask(port: int, prompt: Sequence[int], tokens: int, host: str = "127.0.0.1", prefix: str = "") -> Answer:
    """Greedy completion; ``prefix`` is before the path, where a proxy is asked.

    Raises RefusedError when the server won't answer, OSError when it can't.
    """
    body = {
        "model": "demo",
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", f"{prefix}/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{host}:{port}: {error!r}") from error
    finally:
        connection.close()
    if response.status == _REFUSED:
        raise RefusedError(data.decode(errors="replace"))
    if response.status != _OK:
        raise ConnectionError(f"{host}:{port}: {response.status} {data[:200]!r}")
    choice = json.loads(data)["choices"][0]
    version, admitted = (int(response.headers.get(name, "-1")) for name in (VERSION_HEADER, ADMITTED_HEADER))
    return Answer(tuple(choice["token_ids"]), choice["text"], version, admitted)


@dataclass
class Tally:
    """Steady requests to one server: how many were answered right, refused, not answered, and neither."""

    right: int = 0
    refused: int = 0
    failed: int = 0
    """No answer, or an error that is no refusal: the server was not up, or ended."""
    across: int = 0
    """Answers that a commit fell into: the first tokens from one version, the others from the next."""
    wrong: list[str] = field(default_factory=list)


class Traffic:
    """One request after the other to a server while everything else happens, each answer checked.

    ``ask`` makes one; ``expected`` says what a version answers, None for one that nobody published; ``period`` is
    the pause between two, in seconds.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[], Answer],
        expected: Callable[[int], Expected | None],
        period: float = 0.5,
    ) -> None:
        self.name = name
        self.tally = Tally()
        self._ask = ask
        self._expected = expected
        self._period = period
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"traffic-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for the request under way."""
        self._ended.set()
        self._thread.join(_SECONDS)

    def _run(self) -> None:
        while not self._ended.wait(self._period):
            try:
                self._check(self._ask())
            except RefusedError:
                self.tally.refused += 1
            except OSError:
                self.tally.failed += 1

    def _check(self, answer: Answer) -> None:
        before, after = self._expected(answer.admitted), self._expected(answer.version)
        if before is None or after is None:
            named = f"{answer.admitted} to {answer.version}"
            self.tally.wrong.append(f"{self.name} answered as versions {named}, which nobody published")
        elif answer.tokens == after.tokens:
            self.tally.right += 1
        elif answer.admitted != answer.version and answer.tokens[0] == before.tokens[0]:
            # Pause mode Keep: what a commit falls into begins as one version and goes on as the next.
            self.tally.across += 1
        else:
            self.tally.wrong.append(f"{self.name}, version {answer.version}: {answer.text!r}")
