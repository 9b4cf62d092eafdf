"""Every agent there is, connected or not, as its sessions told; and what was last asked of each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from weightsync_contract import logs
from weightsync_contract.frames import FromAgent
from weightsync_contract.messages import Desired, Hello, Nack, Observed, Released
from weightsync_contract.reasons import RefusalCode
from weightsync_operator.core.model import AgentView
from weightsync_operator.session.connection import Session

log = logs.get(__name__)

OnChange = Callable[[str, bool], None]
"""Called with a namespace, and whether nothing but transferred bytes changed."""


@dataclass(slots=True)
class _Agent:
    view: AgentView
    session: Session | None
    asked: Desired | Released | None = None

    @property
    def speaks(self) -> bool:
        """Whether the view is of the process that the session is with."""
        return self.session is not None and self.session.hello.incarnation == self.view.hello.incarnation


class Registry:
    """Belongs to one event loop."""

    def __init__(self, on_change: OnChange, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_change = on_change
        self._clock = clock
        self._agents: dict[str, _Agent] = {}
        self._seqs: dict[str, int] = {}

    def views(self) -> Mapping[str, AgentView]:
        """A snapshot of all agents, by pod uid."""
        return {uid: agent.view for uid, agent in self._agents.items()}

    def connected(self, namespace: str) -> list[str]:
        """Uids of the pods of a namespace whose agents have a session."""
        return [
            uid
            for uid, agent in self._agents.items()
            if agent.session is not None and agent.view.hello.pod.namespace == namespace
        ]

    def opened(self, session: Session) -> None:
        """An agent has a session now; an older one of the same pod is closed."""
        hello, uid = session.hello, session.hello.pod.uid
        known = self._agents.get(uid)
        if known is not None and known.session is not None:
            known.session.refuse(RefusalCode.REPLACED, "a newer connection speaks for this pod")
        now = self._clock()
        if known is None or known.view.observed is None:
            nacked_term = known.view.nacked_term if known is not None else 0
            view = AgentView(hello, None, True, now, nacked_term)
        elif known.view.hello.incarnation == hello.incarnation:
            view = replace(known.view, hello=hello, connected=True, changed_at=now)
        else:
            # Another process: until it has reported, what counts is that the one before is away, and what that one
            # served. Otherwise a member would be nobody's in between, and be left out of a rollout that begins then.
            view = replace(known.view, connected=False, changed_at=now)
        self._agents[uid] = _Agent(view, session)
        log.info("session opened", pod=_name(hello), role=hello.role, incarnation=hello.incarnation)
        self._on_change(hello.pod.namespace, False)

    def closed(self, session: Session) -> None:
        """A session has ended; nothing happens if it was replaced."""
        agent = self._agents.get(session.hello.pod.uid)
        if agent is None or agent.session is not session:
            return
        agent.session = None
        agent.view = replace(agent.view, connected=False, changed_at=self._clock())
        reason = session.refusal.code if session.refusal else "the agent hung up"
        log.info("session closed", pod=_name(session.hello), reason=reason)
        self._on_change(session.hello.pod.namespace, False)

    def heard(self, session: Session, message: FromAgent) -> None:
        """Take what an agent sent."""
        agent = self._agents.get(session.hello.pod.uid)
        if agent is None or agent.session is not session:
            return
        match message:
            case Observed():
                self._observed(agent, session.hello, message)
            case Nack():
                self._nacked(agent, message)
            case Hello():
                session.refuse(RefusalCode.MALFORMED, "$.type: a second hello: dial again to start anew")

    def forget(self, uid: str) -> None:
        """The pod is gone: close its session and drop what is known of its agent."""
        agent = self._agents.pop(uid, None)
        if agent is not None and agent.session is not None:
            agent.session.refuse(RefusalCode.UNKNOWN_POD, "the pod was deleted")

    def forget_weightsync(self, uid: str) -> None:
        """A WeightSync is gone: its numbers are not needed any more."""
        self._seqs.pop(uid, None)

    def ask(self, uid: str, desired: Desired) -> None:
        """Want something of an agent; what it was asked already, but for the time left, is not sent again."""
        agent = self._agents.get(uid)
        if agent is None or not agent.speaks:
            return
        if isinstance(agent.asked, Desired) and _same(agent.asked, desired):
            return
        seq = self._seqs.get(desired.weightsync.uid, 0) + 1
        self._seqs[desired.weightsync.uid] = seq
        self._send(agent, replace(desired, seq=seq))

    def release(self, uid: str, released: Released) -> None:
        """Want nothing of an agent."""
        agent = self._agents.get(uid)
        if agent is not None and agent.speaks and agent.asked != released:
            self._send(agent, released)

    def close_all(self, message: str) -> None:
        """End every session: this replica goes away."""
        for agent in self._agents.values():
            if agent.session is not None:
                agent.session.refuse(RefusalCode.NOT_LEADER, message)

    def _send(self, agent: _Agent, message: Desired | Released) -> None:
        agent.asked = message
        if agent.session is not None:
            agent.session.offer(message)

    def _observed(self, agent: _Agent, hello: Hello, observed: Observed) -> None:
        if agent.view.hello.incarnation != hello.incarnation:
            agent.view = AgentView(hello, observed, True, self._clock(), agent.view.nacked_term)
            self._on_change(hello.pod.namespace, False)
            return
        before = agent.view.observed
        if before == observed:
            return
        agent.view = replace(agent.view, observed=observed)
        only_bytes = before is not None and _without_bytes(before) == _without_bytes(observed)
        self._on_change(agent.view.hello.pod.namespace, only_bytes)

    def _nacked(self, agent: _Agent, nack: Nack) -> None:
        log.warning(
            "refused by agent",
            pod=_name(agent.view.hello),
            code=nack.code,
            term=nack.term,
            seq=nack.seq,
            message=nack.message,
        )
        # Obeyed further than we ever spoke: another leader spoke under our term, before the status was lost.
        taken = nack.code is RefusalCode.STALE_SEQ and nack.seq > max(self._seqs.values(), default=0)
        if (taken or nack.code is RefusalCode.STALE_TERM) and nack.term > agent.view.nacked_term:
            agent.view = replace(agent.view, nacked_term=nack.term)
            self._on_change(agent.view.hello.pod.namespace, False)


def _same(one: Desired, other: Desired) -> bool:
    return replace(one, seq=0, remaining_ms=0) == replace(other, seq=0, remaining_ms=0)


def _without_bytes(observed: Observed) -> Observed:
    return replace(observed, transfer=replace(observed.transfer, bytes=0))


def _name(hello: Hello) -> str:
    return f"{hello.pod.namespace}/{hello.pod.name}"
