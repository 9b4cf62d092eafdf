"""One pass over one WeightSync: see everything, decide, persist, then send.

The order is part of the safety. The status goes first, with the resourceVersion that the decision was made
on; only when that was written is anything sent, and nothing is written or sent without a valid Lease.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, Protocol, TypeVar

from weightsync_contract import logs
from weightsync_contract.fleetview import FleetView
from weightsync_contract.messages import Released
from weightsync_operator.core.model import AgentView, Note, Plan, Probe, Verdict, World
from weightsync_operator.core.spec import matches
from weightsync_operator.documents import Stored, status_document
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.errors import ConflictError, NotFoundError
from weightsync_operator.kube.resources import get_weightsync, put_status
from weightsync_operator.selection import claims, selects
from weightsync_operator.session.registry import Registry
from weightsync_operator.store import Key, Store

log = logs.get(__name__)

M = TypeVar("M")

_ATTEMPTS: Final = 5
_NONCE_BYTES: Final = 16


class StoodDownError(Exception):
    """Another leader holds a higher term: this process must end."""


class Decide(Protocol[M]):
    """The pure decision."""

    def __call__(self, world: World, memory: M) -> tuple[Plan, M]: ...


class Truth(Protocol):
    """Makes the store as true as the API server."""

    async def refresh_pods(self, namespace: str) -> None: ...


@dataclass(slots=True)
class _Known(Generic[M]):
    uid: str
    memory: M
    view: FleetView | None = None
    verdict: Verdict | None = None
    """What came of the last check that was asked for it."""
    listed_epoch: int = 0
    """Newest epoch whose pods were looked up in an authoritative LIST."""


class Reconciler(Generic[M]):
    """``reconcile`` must not run twice at a time for one key: the queue sees to that."""

    def __init__(
        self,
        *,
        api: Api,
        store: Store,
        registry: Registry,
        truth: Truth,
        decide: Decide[M],
        new_memory: Callable[[], M],
        valid: Callable[[], bool],
        record: Callable[[Stored, Note], None],
        clock: Callable[[], float] = time.monotonic,
        ask: Callable[[Key, Probe], None] | None = None,
    ) -> None:
        self._api = api
        self._store = store
        self._registry = registry
        self._truth = truth
        self._decide = decide
        self._new_memory = new_memory
        self._valid = valid
        self._record = record
        self._clock = clock
        self._ask = ask
        self._known: dict[Key, _Known[M]] = {}
        self.leading_since = clock()

    def view(self, key: Key) -> FleetView | None:
        """The fleet at the last decision."""
        known = self._known.get(key)
        return known.view if known else None

    def answered(self, key: Key, verdict: Verdict) -> None:
        """Take what came of a check; the next pass sees it."""
        known = self._known.get(key)
        if known is not None:
            known.verdict = verdict

    async def reconcile(self, key: Key) -> float | None:
        """One pass; answers in how many seconds the next one is due if nothing changes.

        Raises StoodDownError, or a KubeError when the pass has to be made again later.
        """
        for _ in range(_ATTEMPTS):
            stored = self._store.weightsync(key)
            if stored is None:
                self._forget(key)
                return None
            known = self._known_of(stored)
            world = self._world(stored, known.verdict)
            plan, memory = self._decide(world, known.memory)
            if plan.stand_down:
                raise StoodDownError(f"{key[0]}/{key[1]}: another leader holds a higher term")
            epoch = _newest_epoch(plan)
            if epoch > max(known.listed_epoch, _written_epoch(world)):
                # A watch may have missed that a pod went; a rank for it can't be taken back.
                await self._truth.refresh_pods(stored.ref.namespace)
                known.listed_epoch = epoch
                continue
            if not await self._persist(stored, plan):
                continue
            self._send(plan)
            for note in plan.notes:
                self._record(stored, note)
            if plan.probe is not None and self._ask is not None:
                self._ask(stored.key, plan.probe)
            known.memory, known.view = memory, plan.view
            self.release_unwanted(stored.ref.namespace)
            return plan.requeue_after
        raise ConflictError(f"{key[0]}/{key[1]}: changed under {_ATTEMPTS} passes in a row")

    async def _persist(self, stored: Stored, plan: Plan) -> bool:
        """Write the status if it differs; False if the object has changed since it was read."""
        if plan.status == stored.status:
            return True
        if not self._valid():
            raise StoodDownError("the Lease is not valid any more")
        try:
            document = await put_status(self._api, stored.document, status_document(plan.status))
        except ConflictError:
            await self._reread(stored)
            return False
        except NotFoundError:
            self._store.drop_weightsync(stored.ref.uid)
            return False
        self._store.put_weightsync(document)
        return True

    async def _reread(self, stored: Stored) -> None:
        try:
            self._store.put_weightsync(await get_weightsync(self._api, *stored.key))
        except NotFoundError:
            self._store.drop_weightsync(stored.ref.uid)

    def _send(self, plan: Plan) -> None:
        if not self._valid():
            raise StoodDownError("the Lease is not valid any more")
        for uid, desired in plan.desired.items():
            self._registry.ask(uid, desired)
        for uid, released in plan.released.items():
            self._registry.release(uid, released)

    def _known_of(self, stored: Stored) -> _Known[M]:
        known = self._known.get(stored.key)
        if known is None or known.uid != stored.ref.uid:
            known = self._known[stored.key] = _Known(stored.ref.uid, self._new_memory())
        return known

    def _world(self, stored: Stored, verdict: Verdict | None) -> World:
        pods = self._store.pods(stored.ref.namespace)
        spec = stored.spec
        labelled = [(pod, dict(pod.labels)) for pod in pods]
        trainers = tuple(pod for pod, labels in labelled if matches(spec.trainer, labels))
        members = tuple(pod for pod, labels in labelled if matches(spec.inference, labels))
        views = self._registry.views()
        agents: dict[str, AgentView] = {
            pod.uid: views[pod.uid] for pod in (*trainers, *members) if pod.uid in views
        }
        return World(
            ref=stored.ref,
            generation=stored.generation,
            spec=spec,
            status=stored.status,
            trainers=trainers,
            members=members,
            agents=agents,
            claims=claims(stored, (*trainers, *members), self._store.weightsyncs(stored.ref.namespace)),
            leading_since=self.leading_since,
            now=self._clock(),
            wall=datetime.now(UTC).isoformat(timespec="seconds")[:-6] + "Z",
            nonce=secrets.token_hex(_NONCE_BYTES),
            action=stored.action,
            verdict=verdict,
        )

    def _forget(self, key: Key) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._registry.forget_weightsync(known.uid)
        self.release_unwanted(key[0])

    def release_unwanted(self, namespace: str) -> None:
        """Tell the agents of pods that no WeightSync selects that nothing is wanted of them."""
        weightsyncs = self._store.weightsyncs(namespace)
        if not self._valid():
            return
        for uid in self._registry.connected(namespace):
            pod = self._store.pod(uid)
            if pod is not None and not any(selects(each, pod) for each in weightsyncs):
                self._registry.release(uid, Released(self._term_for(uid), "no WeightSync selects this pod"))

    def _term_for(self, uid: str) -> int:
        # Nobody decides for this agent; any term that it takes will do.
        view = self._registry.views()[uid]
        return max(view.hello.term, view.observed.highest_term if view.observed else 0)


def _written_epoch(world: World) -> int:
    return world.status.group.epoch if world.status.group else 0


def _newest_epoch(plan: Plan) -> int:
    asked = [each.group.epoch for each in plan.desired.values() if each.group is not None]
    return max([plan.status.group.epoch if plan.status.group else 0, *asked])
