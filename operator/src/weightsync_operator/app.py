"""The operator put together: watch -> store -> queue -> decide -> status, then agents."""

import asyncio
import secrets
import signal
import time
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from weightsync_contract import logs
from weightsync_operator.checks import Checks
from weightsync_operator.core.decide import decide
from weightsync_operator.core.memory import Memory
from weightsync_operator.core.model import Note, PodView, Verdict
from weightsync_operator.fleet import FleetServer
from weightsync_operator.health import Health
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import KubeError
from weightsync_operator.kube.reviews import User, may_read, review_token
from weightsync_operator.lease import Elector, LeaseLostError
from weightsync_operator.metrics.collector import FleetNow, ReplicaCollector, ReplicaNow
from weightsync_operator.metrics.meter import Meter
from weightsync_operator.metrics.server import metrics_app, new_registry
from weightsync_operator.pki.authority import Authority, Place, service_names
from weightsync_operator.pki.files import CertificateFiles
from weightsync_operator.pki.serving import Serving
from weightsync_operator.reconcile import Reconciler, StoodDownError
from weightsync_operator.recorder import Recorder
from weightsync_operator.release import own_version
from weightsync_operator.servers import Ports
from weightsync_operator.session.auth import Authenticator
from weightsync_operator.session.connection import KeepAlive
from weightsync_operator.session.registry import Registry
from weightsync_operator.session.server import Leadership, SessionServer
from weightsync_operator.settings import Settings
from weightsync_operator.store import Key, Store
from weightsync_operator.truth import Truth
from weightsync_operator.watch import Watch
from weightsync_operator.workqueue import WorkQueue

log = logs.get(__name__)

_PASS_SECONDS: Final = 30.0
_PROGRESS_SECONDS: Final = 0.5
_WORKERS: Final = 4


class Operator:
    """One replica. ``run`` returns when it was told to stop and raises when it must not go on.

    Make it within the event loop that is to run it. Raises OSError if a port can't be had, UnusableError if
    a certificate can't be served with.
    """

    def __init__(self, settings: Settings, connection: Connection) -> None:
        self._serving = Serving() if settings.session_service or settings.session_cert else None
        self._ports = Ports(settings, self._serving.context if self._serving else None)
        identity = f"{settings.identity}_{secrets.token_hex(4)}"
        self._api = Api(connection)
        self._store = Store()
        self._queue: WorkQueue[Key] = WorkQueue()
        self._health = Health(lambda: self._queue.ticked_at, lambda: self._leading)
        if self._serving:
            self._health.certificate = self._serving.not_ready
        self._registry = Registry(self._agents_changed)
        self._metrics = new_registry()
        self._meter = Meter(self._metrics)
        self._recorder = Recorder(self._api, identity)
        self._checks = Checks(self._check_answered)
        self._leading = False
        own_namespace = settings.lease_namespace or connection.namespace
        self._elector = Elector(
            self._api,
            own_namespace,
            identity,
            f"{settings.advertised_host}:{self._ports.session}",
            settings.lease,
        )
        self._truth = Truth(
            self._api, self._store, self._health, settings.namespace, self._enqueue, self._pod_gone
        )
        self._watch = Watch(
            connection, settings.namespace, self._truth.weightsync_event, self._truth.pod_event
        )
        self._reconciler = Reconciler(
            api=self._api,
            store=self._store,
            registry=self._registry,
            truth=self._truth,
            decide=decide,
            new_memory=Memory,
            valid=self._elector.valid,
            record=self._recorder.record,
            ask=self._checks.ask,
        )
        ReplicaCollector(self._metrics, self._now)
        self._authority, self._files = None, None
        if self._serving and settings.session_service:
            self._authority = self._make_authority(self._serving, settings, own_namespace)
        elif self._serving:
            files = Path(settings.session_cert), Path(settings.session_key)
            self._files = CertificateFiles(self._serving, *files)
        log.info(
            "listening",
            identity=identity,
            host=settings.session_host,
            session=self._ports.session,
            health=self._ports.health,
            metrics=self._ports.metrics,
        )
        if settings.ports_file:
            self._ports.write(Path(settings.ports_file))

    async def run(self, stop: asyncio.Event) -> None:
        """Run until ``stop``. Raises LeaseLostError or StoodDownError: end the process then, at once."""
        await self._ports.serve(self._session_app(), self._health_app(), metrics_app(self._metrics))
        try:
            await self._work_until(stop)
        finally:
            # Before anything is waited for: no session may send another state.
            self._leading = False
            self._registry.close_all("this replica ends: dial the next leader")
        self._queue.close()
        await asyncio.gather(self._ports.close(), self._watch.stop())
        await self._elector.release()
        self._api.close()
        log.info("ended")

    async def _work_until(self, stop: asyncio.Event) -> None:
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            stopping.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)

    async def _work(self) -> None:
        await self._truth.list_until_done()
        self._watch.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._truth.list_for_ever())
                group.create_task(self._elector.run())
                group.create_task(self._lead())
                group.create_task(self._recorder.run())
                group.create_task(self._checks.run())
                for kept in (self._authority, self._files):
                    if kept is not None:
                        group.create_task(kept.run())
        except* (LeaseLostError, StoodDownError) as errors:
            raise _first(errors) from None

    async def _lead(self) -> None:
        await self._elector.elected.wait()
        await self._truth.list_until_done()
        self._reconciler.leading_since = time.monotonic()
        self._queue.tick()
        self._leading = True
        for each in self._store.weightsyncs():
            self._queue.add(each.key)
        if self._authority:
            self._authority.wake()
        async with asyncio.TaskGroup() as group:
            for _ in range(_WORKERS):
                group.create_task(self._reconcile_for_ever())

    async def _reconcile_for_ever(self) -> None:
        while True:
            key = await self._queue.take()
            began, done = time.monotonic(), False
            try:
                async with asyncio.timeout(_PASS_SECONDS):
                    again = await self._reconciler.reconcile(key)
            except StoodDownError:
                raise
            except (KubeError, TimeoutError) as error:
                seconds = self._queue.retry(key)
                log.warning(
                    "pass failed", weightsync="/".join(key), error=str(error) or repr(error), again_in=seconds
                )
            except Exception:
                seconds = self._queue.retry(key)
                log.exception("pass failed", weightsync="/".join(key), again_in=seconds)
            else:
                self._queue.succeeded(key)
                done = True
                self._measure(key)
                if again is not None:
                    self._queue.add_after(key, again)
            finally:
                self._queue.done(key)
                self._meter.reconciled(done, time.monotonic() - began)

    def _measure(self, key: Key) -> None:
        stored, view = self._store.weightsync(key), self._reconciler.view(key)
        if stored is not None and view is not None:
            self._meter.seen(key, view, stored.status)

    def _now(self) -> ReplicaNow:
        fleets = []
        if self._leads():
            weightsyncs = self._store.weightsyncs()
            self._meter.keep(each.key for each in weightsyncs)
            for each in weightsyncs:
                view = self._reconciler.view(each.key)
                stalled = self._meter.stalled(each.key, view) if view else 0
                fleets.append(FleetNow(*each.key, each.status, view, stalled))
        return ReplicaNow(
            version=own_version(),
            leads=self._leads(),
            sessions=sum(each.connected for each in self._registry.views().values()),
            queue_depth=len(self._queue),
            watch_failures=self._watch.failures,
            list_failures=self._truth.failures,
            fleets=fleets,
        )

    def _make_authority(self, serving: Serving, settings: Settings, namespace: str) -> Authority:
        def tell(note: Note, about: str) -> None:
            for each in self._store.weightsyncs(about):
                self._recorder.record(each, note)

        return Authority(
            self._api,
            serving,
            Place(namespace, service_names(settings.session_service, namespace), settings.session_addresses),
            settings.pki,
            lambda: (each.ref.namespace for each in self._store.weightsyncs()),
            self._leads,
            tell,
        )

    def _enqueue(self, key: Key) -> None:
        self._queue.add(key)
        if self._authority:
            self._authority.look(key[0])

    def _leads(self) -> bool:
        return self._leading and self._elector.valid()

    def _leadership(self) -> Leadership:
        if self._leads():
            return Leadership(ready=True)
        own = self._elector.elected.is_set()
        return Leadership(ready=False, address="" if own else self._elector.leader_address)

    def _check_answered(self, key: Key, verdict: Verdict) -> None:
        self._reconciler.answered(key, verdict)
        self._queue.add(key)

    def _pod_gone(self, pod: PodView) -> None:
        self._registry.forget(pod.uid)

    def _agents_changed(self, namespace: str, only_bytes: bool) -> None:
        weightsyncs = self._store.weightsyncs(namespace)
        for each in weightsyncs:
            if only_bytes:
                self._queue.add_after(each.key, _PROGRESS_SECONDS)
            else:
                self._queue.add(each.key)
        if not weightsyncs and self._leading:
            self._reconciler.release_unwanted(namespace)

    def _session_app(self) -> web.Application:
        async def review(token: str, audience: str) -> User | None:
            return await review_token(self._api, token, audience)

        async def allowed(user: User, namespace: str, name: str) -> bool:
            return await may_read(self._api, user, namespace, name)

        app = web.Application()
        SessionServer(
            self._registry,
            Authenticator(review, self._truth.find_pod),
            self._leadership,
            self._elector.valid,
            KeepAlive(),
        ).add_routes(app)
        FleetServer(self._reconciler.view, self._leadership, review, allowed).add_routes(app)
        return app

    def _health_app(self) -> web.Application:
        app = web.Application()
        self._health.heard()
        self._health.add_routes(app)
        return app


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def run_until_signal(settings: Settings, connection: Connection) -> None:
    """Run a replica until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Operator(settings, connection).run(stop)
