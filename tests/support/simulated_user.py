"""Whoever looks after a simulated fleet: promotes, aborts, rolls back, pins; and the checks that a step waits for."""

from dataclasses import replace
from typing import Any

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.core.model import (
    Check,
    HttpCheck,
    OnFailure,
    Pause,
    Pin,
    Plan,
    Probe,
    Status,
    Verdict,
    Wave,
)
from weightsync_operator.core.strategy import wave_size

CHECK = Check(http=HttpCheck("http://eval/ok"), interval=2.0, deadline=15.0)
STRATEGIES: tuple[tuple[Wave, ...], ...] = (
    (),
    (Wave("1", Pause(10.0)),),
    (Wave("1", Pause()), Wave("50%")),
    (Wave("1"), Wave("2", Pause(5.0), CHECK), Wave("100%", Pause(5.0))),
    (Wave("50%", None, CHECK),),
)


class User:
    """``active``: also does what nobody has to do. Never leaves a rollout paused for ever."""

    def __init__(self, simulation: Any, active: bool) -> None:
        self.sim = simulation
        self.clock = simulation.clock
        self.active = active
        random = self.clock.random
        self.waves = random.choice(STRATEGIES)
        self.on_failure = random.choice(list(OnFailure))
        self.chance_to_pass = random.choice([0.0, 0.5, 0.5, 1.0])
        self.action = ""
        self.verdict: Verdict | None = None
        self.probe = ""
        self.paused: tuple[VersionId, int] | None = None
        self.paused_at = 0.0
        self.pause_time = ""
        self.promoted: set[tuple[VersionId, int]] = set()
        self.passed: set[tuple[VersionId, int]] = set()
        self.count = 0

    def begin(self, seconds: float) -> None:
        """Come back every few seconds for as long as the simulation runs; meddle only for so many seconds."""
        end = self.clock.now + seconds
        self.clock.soon(1.0, 9.0, lambda: self._look(end))
        if self.active and self.clock.chance(0.3):
            self.clock.after(1.0, lambda: self._poison(end))

    def _look(self, end: float) -> None:
        random, status = self.clock.random, self.sim.status
        self.clock.soon(3.0, 30.0, lambda: self._look(end))
        if self.paused is not None:
            version = self.paused[0]
            verb = random.choice(["promote", "promote", "abort", "retry"]) if self.active else "promote"
            if self.clock.now > end:
                verb = "promote"
            self.say(verb, version)
        elif self.active and self.clock.now < end and self.clock.chance(0.15):
            self._meddle(status)
        elif self.clock.now >= end and self.sim.spec.pin is not None:
            self._pin(None)
        elif self.clock.now >= end and status.current is None and status.rejected:
            self.say("retry", VersionId(status.rejected[-1].run, status.rejected[-1].version))

    def _poison(self, end: float) -> None:
        """Engines die of the version that is in waves, one now and then."""
        if self.clock.now < end:
            self.clock.soon(1.0, 10.0, lambda: self._poison(end))
        served = [
            member
            for member in self.sim.members
            if self.paused is not None
            and member.engine.weights
            and member.engine.weights[0] == self.paused[0]
        ]
        if served:
            self.clock.random.choice(served).engine_dies()

    def _meddle(self, status: Status) -> None:
        random, stored = self.clock.random, self.sim.trainer.stored
        versions = [each.version for each in stored] or [VersionId("run", 1)]
        kinds = ["rollback", "rollback", "abort", "retry", "pin", "unpin", "unpin"]
        match random.choice(kinds):
            case "pin":
                self._pin(random.choice(versions))
            case "unpin":
                self._pin(None)
            case "rollback":
                self.say("rollback", random.choice(versions))
            case verb:
                rollout = status.rollout
                known = VersionId(rollout.run, rollout.version) if rollout else versions[-1]
                self.say(verb, known)

    def say(self, verb: str, version: VersionId) -> None:
        """Annotate."""
        self.count += 1
        self.action = f"{verb}@{version}#{self.count}"
        self.sim.history.note(self.clock.now, f"user: {self.action}")
        self.sim.operator.wake()

    def _pin(self, version: VersionId | None) -> None:
        sim = self.sim
        pin = Pin(version.version, version.run) if version else None
        if pin == sim.spec.pin:
            return
        sim.history.note(self.clock.now, f"user: pins {version}")
        sim.spec = replace(sim.spec, pin=pin)
        sim.generation += 1
        if version is not None:
            sim.history.may_return.add(version)
        sim.operator.wake()

    # -- checks

    def ask(self, probe: Probe) -> None:
        """The check's answer comes after a while, or, rarely, never."""
        if probe.key == self.probe:
            return
        self.probe = probe.key
        where = self.paused
        passed = self.clock.chance(self.chance_to_pass)

        def arrive() -> None:
            self.verdict = Verdict(probe.key, passed, "fine" if passed else "HTTP 503")
            if passed and where is not None:
                self.passed.add(where)
            self.sim.operator.wake()

        if not self.clock.chance(0.05):
            self.clock.soon(0.05, 3.0, arrive)

    # -- what may never be

    def watch(self, before: Status, plan: Plan) -> None:
        """Look at a plan that is about to be carried out."""
        self._returns(before, plan.status)
        self._steps(plan.status)
        self._wave(plan)

    def _returns(self, before: Status, after: Status) -> None:
        """What somebody asked to go back to."""
        answer = next((row for row in after.conditions if row.type == Condition.ACTION_TAKEN), None)
        if answer is not None and answer.reason == Reason.ACCEPTED:
            verb, _, rest = answer.message.partition("@")
            run, _, number = rest.partition(":")[0].partition("#")[0].partition("/")
            version = VersionId(run, int(number))
            if verb == "rollback":
                self.sim.history.may_return.add(version)
            if verb in ("abort", "rollback") and before.current is not None:
                self.sim.history.may_return.add(VersionId(before.current.run, before.current.version))
            if verb == "promote" and self.paused and answer.message.split(":")[0] == self.action:
                self.promoted.add(self.paused)
        failed = after.rollout is not None and after.rollout.outcome is Outcome.FAILED
        if failed and self.on_failure is OnFailure.ROLLBACK and before.current is not None:
            self.sim.history.may_return.add(VersionId(before.current.run, before.current.version))

    def _steps(self, after: Status) -> None:
        """A paused rollout goes on by time, check and promotion only."""
        rollout = after.rollout
        if rollout is None or rollout.step_index is None or rollout.outcome is not Outcome.IN_PROGRESS:
            self.paused = None
            return
        version, step = VersionId(rollout.run, rollout.version), rollout.step_index
        if self.paused is not None and self.paused[0] == version and step > self.paused[1]:
            self._may_go_on(self.paused)
        if not rollout.pause_time:
            self.paused = None
        elif self.paused != (version, step) or rollout.pause_time != self.pause_time:
            self.paused, self.paused_at, self.pause_time = (version, step), self.clock.now, rollout.pause_time
            self.promoted.discard(self.paused)
            self.passed.discard(self.paused)

    def _may_go_on(self, paused: tuple[VersionId, int]) -> None:
        wave = self.waves[paused[1]]
        if paused in self.promoted:
            return
        seconds = wave.pause.seconds if wave.pause else 0.0
        waited = seconds is not None and self.clock.now >= self.paused_at + seconds - 0.01
        if not waited or (wave.check is not None and paused not in self.passed):
            raise self.sim.history.violation(f"{paused[0]} went on after step {paused[1]} by itself")

    def _wave(self, plan: Plan) -> None:
        """No more members are told to switch than the written step is of."""
        rollout, sim = plan.status.rollout, self.sim
        if rollout is None or rollout.step_index is None or rollout.outcome is not Outcome.IN_PROGRESS:
            return
        version = VersionId(rollout.run, rollout.version)
        told = {uid for uid, each in plan.desired.items() if each.commit == version}
        views = sim.operator.views
        serving = {
            uid
            for uid, view in views.items()
            if view.observed and view.observed.serving and view.observed.serving.version == version
        }
        step, total = rollout.step_index, len(sim.members)
        most = total if step >= len(self.waves) else wave_size(self.waves[step].members, total)
        if told - serving and len(told | serving) > most:
            raise sim.history.violation(
                f"step {step} is of {most} members, {sorted(told | serving)} are told"
            )
