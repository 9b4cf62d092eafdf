"""One pass at a real API server, with a scripted decision: what is written before what is sent."""

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cluster_objects import ClusterObjects
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from weightsync_contract.messages import Desired, Group, Hello, PodRef, Released
from weightsync_contract.reasons import Role
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.core.model import GroupStatus, Note, Plan, World
from weightsync_operator.documents import Stored
from weightsync_operator.health import Health
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import ConflictError, ForbiddenError
from weightsync_operator.kube.resources import put_status
from weightsync_operator.reconcile import Reconciler, StoodDownError
from weightsync_operator.session.registry import Registry
from weightsync_operator.store import Store
from weightsync_operator.truth import Truth

pytestmark = pytest.mark.usefixtures("crds")

Decision = Callable[[World, int], tuple[Plan, int]]


class RecordingSession:
    """Takes what would go to an agent; no socket is needed to see the order of things."""

    def __init__(self, hello: Hello, on_offer: Callable[[], None]) -> None:
        self.hello = hello
        self.refusal = None
        self.offered: list[Desired | Released] = []
        self._on_offer = on_offer

    def offer(self, message: Desired | Released) -> None:
        self._on_offer()
        self.offered.append(message)

    def refuse(self, *_: Any) -> None:
        raise AssertionError("nobody should be refused here")


@dataclass
class Bench:
    """A reconciler with real edges, and what went on around it."""

    objects: ClusterObjects
    api: Api
    store: Store
    truth: Truth
    registry: Registry
    decide: Decision = lambda world, memory: (Plan(world.status), memory)
    is_valid: bool = True
    notes: list[Note] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    terms_when_sent: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reconciler: Reconciler[int] = Reconciler(
            api=self.api,
            store=self.store,
            registry=self.registry,
            truth=self.truth,
            decide=self._decide,
            new_memory=int,
            valid=lambda: self.is_valid,
            record=self._record,
        )

    def _decide(self, world: World, memory: int) -> tuple[Plan, int]:
        return self.decide(world, memory)

    def _record(self, _: Stored, note: Note) -> None:
        self.notes.append(note)

    @property
    def key(self) -> tuple[str, str]:
        return self.objects.namespace, "policy"

    def agent(self, pod: PodRef) -> RecordingSession:
        def remember_what_is_persisted() -> None:
            with suppress(ApiException):
                self.terms_when_sent.append(self.objects.read().get("status", {}).get("term", 0))

        hello = Hello(1, 1, pod, Role.INFERENCE, "one", 0)
        session = RecordingSession(hello, remember_what_is_persisted)
        self.registry.opened(session)  # type: ignore[arg-type]
        return session


@pytest.fixture
async def bench(apiserver: ApiServer, api_client: client.ApiClient, namespace: str) -> AsyncIterator[Bench]:
    api = Api(Connection(str(apiserver.kubeconfig)))
    store, registry = Store(), Registry(lambda *_: None)
    gone: list[str] = []
    truth = Truth(
        api,
        store,
        Health(ticked_at=lambda: 0.0, leads=lambda: True),
        namespace,
        enqueue=lambda _: None,
        pod_gone=lambda pod: gone.append(pod.name),
    )
    objects = ClusterObjects(api_client, namespace)
    objects.weightsync()
    made = Bench(objects, api, store, truth, registry, gone=gone)
    await truth.list_until_done()
    yield made
    api.close()


def asking(term: int, *pods: PodRef, epoch: int = 0) -> Decision:
    """A decision that wants a term written and every pod asked for something."""

    def decide(world: World, memory: int) -> tuple[Plan, int]:
        group = Group(epoch, "nonce", 1, 1, 2) if epoch else None
        desired = {pod.uid: Desired(world.ref, term, 0, group=group) for pod in pods}
        status = replace(world.status, term=term)
        if epoch:
            status = replace(status, group=GroupStatus(epoch))
        return Plan(status, desired=desired, notes=(Note("Complete", "done"),), requeue_after=7.0), memory + 1

    return decide


async def test_what_is_sent_was_written_before(bench: Bench) -> None:
    pod = bench.objects.pod("vllm-0", "inference", "vllm")
    await bench.truth.refresh_pods(bench.objects.namespace)
    session = bench.agent(pod)
    bench.decide = asking(3, pod)
    assert await bench.reconciler.reconcile(bench.key) == 7.0
    assert bench.terms_when_sent == [3]
    assert [each.term for each in session.offered] == [3]
    assert bench.notes == [Note("Complete", "done")]


async def test_a_stale_decision_is_neither_written_nor_sent_nor_remembered(bench: Bench) -> None:
    pod = bench.objects.pod("vllm-0", "inference", "vllm")
    await bench.truth.refresh_pods(bench.objects.namespace)
    session = bench.agent(pod)
    seen: list[tuple[bool, int]] = []

    def decide(world: World, memory: int) -> tuple[Plan, int]:
        seen.append((world.spec.paused, memory))
        # Somebody edits the spec between this decision's sight and its write.
        if len(seen) == 1:
            bench.objects.patch({"spec": {"paused": True}})
        return asking(5 if world.spec.paused else 4, pod)(world, memory)

    bench.decide = decide
    await bench.reconciler.reconcile(bench.key)
    assert seen == [(False, 0), (True, 0)]
    assert [each.term for each in session.offered] == [5]
    assert bench.objects.read()["status"]["term"] == 5
    assert len(bench.notes) == 1


async def test_an_object_that_changes_all_the_time_is_left_for_later(bench: Bench) -> None:
    number = 0

    def decide(world: World, memory: int) -> tuple[Plan, int]:
        nonlocal number
        number += 1
        bench.objects.patch({"metadata": {"annotations": {"n": str(number)}}})
        return asking(3)(world, memory)

    bench.decide = decide
    with pytest.raises(ConflictError, match="changed under 5 passes"):
        await bench.reconciler.reconcile(bench.key)
    assert "status" not in bench.objects.read()


async def test_without_a_valid_lease_nothing_is_written_or_sent(bench: Bench) -> None:
    pod = bench.objects.pod("vllm-0", "inference", "vllm")
    await bench.truth.refresh_pods(bench.objects.namespace)
    session = bench.agent(pod)
    bench.is_valid, bench.decide = False, asking(3, pod)
    with pytest.raises(StoodDownError, match="Lease"):
        await bench.reconciler.reconcile(bench.key)
    assert "status" not in bench.objects.read()
    # Also when there is nothing to write.
    bench.decide = lambda world, memory: (Plan(world.status, {pod.uid: Desired(world.ref, 3, 0)}), memory)
    with pytest.raises(StoodDownError, match="Lease"):
        await bench.reconciler.reconcile(bench.key)
    assert session.offered == []


async def test_whoever_stands_down_sends_nothing(bench: Bench) -> None:
    pod = bench.objects.pod("vllm-0", "inference", "vllm")
    session = bench.agent(pod)
    bench.decide = lambda world, memory: (
        replace(asking(3, pod)(world, memory)[0], stand_down=True),
        memory,
    )
    with pytest.raises(StoodDownError, match="higher term"):
        await bench.reconciler.reconcile(bench.key)
    assert session.offered == []
    assert "status" not in bench.objects.read()


async def test_a_failed_write_sends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = bench.objects.pod("vllm-0", "inference", "vllm")
    await bench.truth.refresh_pods(bench.objects.namespace)
    session = bench.agent(pod)
    bench.decide = asking(3, pod)

    async def refuse(*_: Any) -> Any:
        raise ForbiddenError("403")

    monkeypatch.setattr("weightsync_operator.reconcile.put_status", refuse)
    with pytest.raises(ForbiddenError):
        await bench.reconciler.reconcile(bench.key)
    assert session.offered == []
    assert bench.notes == []


async def test_ranks_are_given_only_by_a_list_that_was_just_made(bench: Bench) -> None:
    bench.objects.pod("vllm-0", "inference", "vllm")
    ghost = bench.objects.pod("vllm-1", "inference", "vllm")
    await bench.truth.refresh_pods(bench.objects.namespace)
    # The watch, which nobody runs here, does not tell that it went.
    bench.objects.delete_pod("vllm-1")
    seen: list[list[str]] = []

    def decide(world: World, memory: int) -> tuple[Plan, int]:
        seen.append(sorted(each.name for each in world.members))
        return asking(1, epoch=1)(world, memory)

    bench.decide = decide
    await bench.reconciler.reconcile(bench.key)
    assert seen == [["vllm-0", "vllm-1"], ["vllm-0"]]
    assert bench.gone == ["vllm-1"]
    assert bench.store.pod(ghost.uid) is None
    # The same epoch again needs no other list.
    await bench.reconciler.reconcile(bench.key)
    assert len(seen) == 3


async def test_a_list_also_comes_before_rank_0_is_asked(bench: Bench) -> None:
    pod = bench.objects.pod("trainer-0", "trainer", "trainer")
    passes = 0

    def decide(world: World, memory: int) -> tuple[Plan, int]:
        nonlocal passes
        passes += 1
        plan, memory = asking(1, *[PodRef(p.namespace, p.name, p.uid) for p in world.trainers], epoch=1)(
            world, memory
        )
        return replace(plan, status=replace(plan.status, group=None)), memory

    await bench.truth.refresh_pods(bench.objects.namespace)
    session = bench.agent(pod)
    bench.decide = decide
    await bench.reconciler.reconcile(bench.key)
    assert passes == 2
    assert len(session.offered) == 1


async def test_what_is_unchanged_is_not_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []

    async def counted(*arguments: Any) -> Any:
        writes.append(arguments)
        return await put_status(*arguments)

    monkeypatch.setattr("weightsync_operator.reconcile.put_status", counted)
    bench.decide = asking(3)
    for _ in range(4):
        await bench.reconciler.reconcile(bench.key)
    assert len(writes) == 1


async def test_memory_goes_from_pass_to_pass_and_ends_with_its_object(bench: Bench) -> None:
    seen: list[int] = []

    def decide(world: World, memory: int) -> tuple[Plan, int]:
        seen.append(memory)
        return Plan(world.status), memory + 1

    bench.decide = decide
    await bench.reconciler.reconcile(bench.key)
    await bench.reconciler.reconcile(bench.key)
    bench.objects.delete()
    bench.objects.weightsync()
    await bench.truth.list_until_done()
    await bench.reconciler.reconcile(bench.key)
    assert seen == [0, 1, 0]


async def test_agents_that_nobody_wants_are_told_so(bench: Bench) -> None:
    wanted = bench.objects.pod("vllm-0", "inference", "vllm")
    unwanted = bench.objects.pod("other-0", "inference", "other")
    await bench.truth.refresh_pods(bench.objects.namespace)
    sessions = [bench.agent(wanted), bench.agent(unwanted)]
    await bench.reconciler.reconcile(bench.key)
    assert [len(each.offered) for each in sessions] == [0, 1]
    bench.objects.delete()
    await bench.truth.list_until_done()
    await bench.reconciler.reconcile(bench.key)
    assert [len(each.offered) for each in sessions] == [1, 1]
    assert all(isinstance(each.offered[0], Released) for each in sessions)
