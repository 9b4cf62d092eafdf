"""The edge to the engine: each order is answered once, whatever the engine does with it."""

import asyncio
import os

import pytest

from weightsync_contract.manifest import Manifest, TensorSpec
from weightsync_contract.messages import Capability, InFlight, VersionId
from weightsync_contract.reasons import FailureCode
from weightsync_engine.adapter import (
    ApplyError,
    EngineInfo,
    EngineUnreachableError,
    ManifestRefusedError,
)
from weightsync_engine.agent import engines as module
from weightsync_engine.agent.core.effects import Apply, Preflight, RestartEngine, Resume
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ApplyFailed,
    EngineGone,
    EngineSeen,
    PreflightEnded,
    ResumeEnded,
)
from weightsync_engine.agent.engines import Engines
from weightsync_engine.agent.manifests import Manifests
from weightsync_engine.agent.staging import StagingArea

MANIFEST = Manifest((TensorSpec("w", "float32", (4,)),))
VERSION = VersionId("run", 1)
APPLY = Apply("b1", 1, VERSION, MANIFEST.layout, "d", MANIFEST.nbytes, InFlight.KEEP, 4.0)
SECONDS = 5.0


class FakeEngine:
    """Does what ``does`` says for a call: an exception to raise, an event to wait for, or nothing."""

    def __init__(self):
        self.boot = "b1"
        self.does = {}
        self.calls = []
        self.called = asyncio.Event()

    async def until(self, name, count=1):
        async with asyncio.timeout(SECONDS):
            while self.calls.count(name) < count:
                self.called.clear()
                await self.called.wait()

    async def _call(self, name):
        self.calls.append(name)
        self.called.set()
        does = self.does.get(name)
        if isinstance(does, Exception):
            raise does
        if isinstance(does, asyncio.Event):
            await does.wait()

    async def probe(self):
        await self._call("probe")
        return EngineInfo(self.boot, 1, (Capability.STAGES,))

    async def preflight(self, manifest):
        assert manifest == MANIFEST
        await self._call("preflight")

    async def apply(self, staged, in_flight, seconds):
        assert os.fstat(staged.fd).st_size == staged.nbytes == MANIFEST.nbytes
        await self._call("apply")
        os.fstat(staged.fd)

    async def resume(self):
        await self._call("resume")

    async def restart(self, reason):
        await self._call("restart")


class Edge:
    def __init__(self):
        self.engine = FakeEngine()
        self.staging = StagingArea()
        self.staging.create(1, MANIFEST.nbytes)
        manifests = Manifests()
        manifests.keep(MANIFEST)
        self.events = []
        self.happened = asyncio.Event()
        self.engines = Engines(self.engine, manifests, self.staging, self.post)

    def post(self, event):
        self.events.append(event)
        self.happened.set()

    async def next(self):
        async with asyncio.timeout(SECONDS):
            while not self.events:
                self.happened.clear()
                await self.happened.wait()
        return self.events.pop(0)


@pytest.fixture
async def edge():
    edge = Edge()
    yield edge
    await edge.engines.close()
    edge.staging.close()


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        (None, None, ""),
        (ManifestRefusedError("tensor 'w': shape"), FailureCode.MANIFEST_REFUSED, "tensor 'w'"),
        (EngineUnreachableError("refused"), FailureCode.ENGINE_UNREACHABLE, "refused"),
        (ValueError("a defect"), FailureCode.ENGINE_UNREACHABLE, "a defect"),
    ],
)
async def test_a_preflight_is_answered(edge, does, code, says):
    edge.engine.does["preflight"] = does
    edge.engines.preflight(Preflight("b1", MANIFEST.layout))
    event = await edge.next()
    assert (event.boot, event.layout, event.code) == ("b1", MANIFEST.layout, code)
    assert says in event.message


async def test_a_preflight_that_hangs_is_answered(edge, monkeypatch):
    monkeypatch.setattr(module, "PREFLIGHT_SECONDS", 0.1)
    edge.engine.does["preflight"] = asyncio.Event()
    edge.engines.preflight(Preflight("b1", MANIFEST.layout))
    event = await edge.next()
    assert isinstance(event, PreflightEnded)
    assert event.code is FailureCode.ENGINE_UNREACHABLE


@pytest.mark.parametrize(
    ("does", "clean"),
    [
        (ApplyError(True, "no rank has memory"), True),
        (ApplyError(False, "rank 1 died"), False),
        (ConnectionResetError("peer"), False),
        (ValueError("a defect"), False),
    ],
)
async def test_what_nobody_knows_to_be_clean_is_not(edge, does, clean):
    edge.engine.does["apply"] = does
    edge.engines.apply(APPLY)
    event = await edge.next()
    assert isinstance(event, ApplyFailed)
    assert (event.boot, event.slot, event.clean) == ("b1", 1, clean)


async def test_an_apply_is_answered(edge):
    edge.engines.apply(APPLY)
    assert await edge.next() == ApplyDone("b1", 1)


async def test_another_boot_is_not_applied_to(edge):
    edge.engine.boot = "b2"
    edge.engines.apply(APPLY)
    event = await edge.next()
    assert (event.boot, event.clean) == ("b1", True)
    assert "boot b2 now, not b1" in event.message
    assert "apply" not in edge.engine.calls


async def test_an_engine_that_is_busy_is_asked_again_before_it_is_applied_to(edge):
    edge.engine.does["probe"] = EngineUnreachableError("busy")
    edge.engines.apply(APPLY)
    await asyncio.sleep(0.3)
    assert edge.events == []
    edge.engine.does.clear()
    assert await edge.next() == ApplyDone("b1", 1)


async def test_an_engine_that_is_gone_is_not_applied_to(edge):
    edge.engine.does["probe"] = EngineUnreachableError("connection refused")
    edge.engines.apply(APPLY)
    event = await edge.next()
    assert isinstance(event, ApplyFailed)
    assert event.clean
    assert "apply" not in edge.engine.calls


async def test_memory_given_back_in_an_apply_stays_until_its_end(edge):
    going_on = asyncio.Event()
    edge.engine.does["apply"] = going_on
    edge.engines.apply(APPLY)
    await edge.engine.until("apply")
    edge.staging.drop(1)
    going_on.set()
    assert await edge.next() == ApplyDone("b1", 1)


async def test_a_restart_cuts_off_what_the_engine_was_told(edge):
    edge.engine.does["apply"] = asyncio.Event()
    edge.engines.apply(APPLY)
    await edge.engine.until("apply")
    edge.engines.restart(RestartEngine("b1", "mixed"))
    await edge.engine.until("restart")
    edge.engine.does["apply"].set()
    await asyncio.sleep(0.05)
    assert edge.events == []


@pytest.mark.parametrize("does", [EngineUnreachableError("still there"), OSError("x"), None])
async def test_a_restart_that_fails_ends_nothing_but_itself(edge, does):
    edge.engine.does["restart"] = does
    edge.engines.restart(RestartEngine("b1", "mixed"))
    await edge.engine.until("restart")
    edge.engine.does.clear()
    edge.engines.resume(Resume("b1"))
    assert await edge.next() == ResumeEnded("b1")


async def test_a_resume_that_fails_says_so(edge):
    edge.engine.does["resume"] = EngineUnreachableError("503")
    edge.engines.resume(Resume("b1"))
    assert await edge.next() == ResumeEnded("b1", "503")


async def test_the_engine_is_watched(edge, monkeypatch):
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(module, "PROBE_SOON_SECONDS", 0.02)
    watching = asyncio.create_task(edge.engines.watch())
    seen = EngineSeen("b1", 1, (Capability.STAGES,))
    assert await edge.next() == seen
    edge.engine.does["probe"] = EngineUnreachableError("connection refused")
    assert await edge.next() == EngineGone()
    edge.engine.does.clear()
    assert await edge.next() == seen
    edge.engine.boot = "b2"
    assert (await edge.next()).boot == "b2"
    await asyncio.sleep(0.2)
    assert edge.events == [], "what has not changed is not news"
    watching.cancel()


async def test_one_missed_probe_is_no_news(edge, monkeypatch):
    monkeypatch.setattr(module, "PROBE_SOON_SECONDS", 0.05)
    watching = asyncio.create_task(edge.engines.watch())
    await edge.next()
    edge.engine.does["probe"] = EngineUnreachableError("busy")
    await edge.engine.until("probe", edge.engine.calls.count("probe") + 1)
    edge.engine.does.clear()
    await asyncio.sleep(0.3)
    assert edge.events == []
    watching.cancel()
