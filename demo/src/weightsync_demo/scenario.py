"""The story that the demo plays: three versions, one server killed in mid-transfer, one that joins late."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from weightsync_contract.messages import TransferState, VersionId
from weightsync_demo.answers import TOKENS, Answer, Expected, RefusedError, Traffic, ask
from weightsync_demo.fleet import FleetReader
from weightsync_demo.supervisor import PodSpec, Supervisor
from weightsync_demo.trainer_handle import Trainer
from weightsync_demo.view import View, brief
from weightsync_demo.waiting import wait_for

T = TypeVar("T")

_TRAIN_SECONDS: Final = 600.0
_SERVE_SECONDS: Final = 300.0
_TRANSFER_SECONDS: Final = 60.0
_MARGIN: Final = 1e-3
"""Logits that every expected token has to be ahead; rounding differs by some 1e-5."""


@dataclass(frozen=True)
class Server:
    """An inference pod and where its engine listens."""

    spec: PodSpec
    port: int


@dataclass
class Story:
    """Plays the scenario and keeps what came out."""

    supervisor: Supervisor
    fleet: FleetReader
    trainer: Trainer
    view: View
    run: str
    prompt: tuple[int, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    versions: list[dict[str, Any]] = field(default_factory=list)
    _expected: dict[int, Expected] = field(default_factory=dict)
    _servers: list[Server] = field(default_factory=list)
    _traffic: list[Traffic] = field(default_factory=list)

    def play(self, first: list[Server], late: Server) -> None:
        """Run it to the end. Raises TimeoutError or RuntimeError saying what did not come."""
        for server in first:
            self._add(server)
        self._publish(1)
        self._until_served(1, "first_version")

        victim = first[-1].spec.name
        self._publish(2)
        self._kill_in_transfer(victim)
        self._until_served(2, "killed_and_back")

        self.view.say(f"{late.spec.name} joins late")
        self.supervisor.run(late.spec)
        self._add(late)
        self._until_served(2, "late_joiner")

        self._publish(3)
        self._until_served(3, "third_version")

    def stop(self) -> None:
        """End the steady requests."""
        for traffic in self._traffic:
            traffic.stop()

    def members(self) -> list[dict[str, Any]]:
        """Each server: the version that it serves now, and whether it answers as the trainer's weights do."""
        out = []
        for server in self._servers:
            answer = self._ask(server)
            expected = self._expected.get(answer.version)
            equal = expected is not None and answer.tokens == expected.tokens
            out.append({"name": server.spec.name, "version": answer.version, "tokens_equal": equal})
        return out

    def traffic(self) -> dict[str, Any]:
        """What the steady requests met."""
        tallies = [traffic.tally for traffic in self._traffic]
        return {
            "right": sum(t.right for t in tallies),
            "across_a_commit": sum(t.across for t in tallies),
            "refused": sum(t.refused for t in tallies),
            "wrong": [text for t in tallies for text in t.wrong],
        }

    # ------------------------------------------------------------------------------------------- steps

    def _add(self, server: Server) -> None:
        self._servers.append(server)
        question = partial(ask, server.port, self.prompt, TOKENS)
        traffic = Traffic(server.spec.name, question, self._expected.get)
        self._traffic.append(traffic)
        traffic.start()

    def _publish(self, version: int) -> None:
        self.view.say(f"the trainer trains version {version}")
        self.trainer.train(version)
        trained = self.trainer.wait("trained", _TRAIN_SECONDS)
        told = self.trainer.wait("expected", _TRAIN_SECONDS)
        if told["margin"] < _MARGIN:
            raise RuntimeError(
                f"version {version}: a token leads by {told['margin']:.1e} logits only: no fair test"
            )
        self._expected[version] = Expected(tuple(told["tokens"]), told["text"], told["margin"])
        published = self.trainer.wait("published", _TRAIN_SECONDS)
        self.view.say(
            f"published version {version} ({trained['steps']} steps, loss {trained['loss']:.3f}; its own "
            f"weights answer {told['text']!r}) in {published['seconds']:.2f} s"
        )

    def _kill_in_transfer(self, name: str) -> None:
        def under_way() -> int:
            member = self.fleet.member(name)
            transfer = member.transfer if member else None
            moving = (
                transfer and transfer.state is TransferState.RECEIVING and transfer.version == self._id(2)
            )
            return transfer.bytes if transfer and moving else 0

        received = self._wait(under_way, _TRANSFER_SECONDS, f"{name} to receive")
        self.supervisor.get(name).workload.kill()
        self.view.say(f"killed {name}'s server in mid-transfer, {brief(received)} received")

    def _until_served(self, version: int, step: str) -> None:
        began = time.monotonic()
        names = [server.spec.name for server in self._servers]
        wanted = self._id(version)
        self._wait(
            lambda: self.fleet.serving(names, wanted), _SERVE_SECONDS, f"{names} to serve version {version}"
        )
        self.seconds[step] = round(time.monotonic() - began, 2)
        self.view.say(f"all of {', '.join(names)} serve version {version}, {self.seconds[step]:.1f} s after")
        expected, rows = self._expected[version], []
        for server in self._servers:
            answer = self._ask(server)
            equal = answer.tokens == expected.tokens and answer.version == version
            self.view.answer(server.spec.name, answer.text, equal)
            rows.append({"name": server.spec.name, "text": answer.text, "tokens_equal": equal})
        self.versions.append({"step": step, "version": version, "expected": expected.text, "answers": rows})

    def _ask(self, server: Server) -> Answer:
        return wait_for(
            lambda: ask(server.port, self.prompt, TOKENS),
            _TRANSFER_SECONDS,
            f"{server.spec.name} to answer",
            ignoring=(RefusedError, OSError),
        )

    def _id(self, version: int) -> VersionId:
        return VersionId(self.run, version)

    def _wait(self, predicate: Callable[[], T], seconds: float, what: str) -> T:
        try:
            return wait_for(predicate, seconds, what, interval=0.02)
        except TimeoutError as error:
            view = self.fleet.latest
            why = f"{view.phase}: {view.message}" if view else self.fleet.trouble
            raise TimeoutError(f"{error}; the fleet says {why}") from error
