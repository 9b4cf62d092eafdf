"""The operator's own authority at work: the leader keeps Secret and ConfigMaps, each replica its certificate.

Every replica signs its own serving certificate with what it has just read, and keeps it in memory: nothing but
the authority is stored. Conflicting writes are refused by the API server, so a leader that does not know yet
that it leads no more changes nothing.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from weightsync_contract import logs
from weightsync_contract.names import CA_NAME
from weightsync_contract.reasons import Reason
from weightsync_operator.core.model import Note
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.errors import ConflictError, KubeError
from weightsync_operator.kube.named import find_configmap, find_secret, write_configmap, write_secret
from weightsync_operator.pki import words
from weightsync_operator.pki.certificates import Leaf, issue, make_ca
from weightsync_operator.pki.core import Authorities, Bundle, Decision, NotOurs, Seen, Step, decide
from weightsync_operator.pki.serving import Serving, wall
from weightsync_operator.pki.stored import (
    Document,
    bundle_document,
    owner_of,
    read_bundle,
    read_secret,
    secret_document,
)
from weightsync_operator.pki.times import PkiTimes

log = logs.get(__name__)

_PASS_SECONDS: Final = 120.0
_AGAIN_SECONDS: Final = 2.0
_ROUNDS: Final = 8
_CLUSTER_DOMAIN: Final = "cluster.local"

Tell = Callable[[Note, str], None]
"""Records an Event on the WeightSyncs of a namespace, on all of them if it is empty."""


@dataclass(frozen=True, slots=True)
class Place:
    """Whose authority it is, and by which names and addresses its replica is dialled."""

    namespace: str
    names: Sequence[str]
    addresses: Sequence[str] = ()


def service_names(service: str, namespace: str) -> tuple[str, ...]:
    """The DNS names of a Service given as NAME, NAME.NAMESPACE or NAME.NAMESPACE.svc."""
    name, _, rest = service.partition(".")
    namespace = rest.removesuffix(".svc") or namespace
    whole = f"{name}.{namespace}.svc"
    return name, f"{name}.{namespace}", whole, f"{whole}.{_CLUSTER_DOMAIN}"


class Authority:
    """One replica's part. ``leads`` is asked before each write, ``namespaces`` for those with a WeightSync."""

    def __init__(
        self,
        api: Api,
        serving: Serving,
        place: Place,
        times: PkiTimes,
        namespaces: Callable[[], Iterable[str]],
        leads: Callable[[], bool],
        tell: Tell,
        clock: Callable[[], datetime] = wall,
    ) -> None:
        self._api = api
        self._serving = serving
        self._place = place
        self._secret = words.secret_name(place.namespace)
        self._times = times
        self._namespaces = namespaces
        self._leads = leads
        self._tell = tell
        self._clock = clock
        self._wake = asyncio.Event()
        self.looked_at: frozenset[str] = frozenset()
        """Namespaces that the last look as the leader was about."""
        self._leaf: Leaf | None = None
        self._signed_by = ""
        self._said: dict[str, str] = {}

    def wake(self) -> None:
        """Look at once: this replica leads now."""
        self._wake.set()

    def look(self, namespace: str) -> None:
        """Look at once if this namespace has not been looked at: it has a WeightSync now."""
        if namespace not in self.looked_at and self._leads():
            self._wake.set()

    async def run(self) -> None:
        """Keep everything as it has to be, for ever."""
        while True:
            self._wake.clear()
            failed = True
            try:
                async with asyncio.timeout(_PASS_SECONDS):
                    await self._pass()
                failed = False
            except (KubeError, TimeoutError) as error:
                self._trouble(f"Secret {self._secret} can't be kept: {str(error) or repr(error)}")
            except Exception:
                log.exception("the authority can't be kept")
            # A follower is waited for until the leader has made what it signs with.
            soon = failed or self._serving.not_ready()
            seconds = min(self._times.check, _AGAIN_SECONDS) if soon else self._times.check
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    async def _pass(self) -> None:
        document = await find_secret(self._api, self._place.namespace, CA_NAME)
        seen = read_secret(document, self._place.namespace)
        try:
            if self._leads():
                seen = await self._keep(seen, document)
        finally:
            # Also when something can't be written: the certificate in use ends all the same.
            self._serve(seen)

    async def _keep(self, seen: Seen, document: Document | None) -> Seen:
        """Everything that the leader does; answers what the Secret says afterwards."""
        namespaces = self.looked_at = frozenset(self._namespaces())
        for _ in range(_ROUNDS):
            wanted = seen.bundle if isinstance(seen, Authorities) else ""
            found = {each: await self._find_bundle(each) for each in sorted(namespaces)}
            states = {name: self._state(each, wanted) for name, each in found.items()}
            now = self._clock()
            decision = decide(seen, states, now, self._times, make_ca(now, self._times))
            if decision.store is not None:
                trusted = self._leaf is not None or any(self._is_ours(each) for each in found.values())
                document = await self._store(decision, decision.store, document, trusted)
                seen = read_secret(document, self._place.namespace)
                continue
            self._over(name for name, state in states.items() if state is Bundle.RIGHT)
            self._say_not_ours(seen, decision, found)
            if not await self._publish(wanted, decision.publish, found):
                return seen
        log.warning("the authority changes all the time", rounds=_ROUNDS)
        return seen

    async def _store(
        self, decision: Decision, wanted: Authorities, over: Document | None, trusted: bool
    ) -> Document:
        """Write the Secret over the one that was read; answers it. Raises ConflictError if anybody was faster.

        ``trusted``: somebody trusts an authority of ours already.
        """
        if not self._leads():
            raise ConflictError("this replica does not lead any more")
        written = await write_secret(self._api, secret_document(wanted, self._place.namespace, over))
        log.info("authority", secret=self._secret, step=decision.step, why=decision.why)
        if decision.step is Step.REPLACE or (decision.step is Step.CREATE and trusted):
            message = words.replaced(decision.why or "it was deleted", self._place.namespace)
            log.error("authority replaced", message=message)
            self._tell(Note(Reason.AUTHORITY_REPLACED, message, warning=True), "")
        return written

    async def _publish(self, bundle: str, into: Sequence[str], found: Mapping[str, "_Found"]) -> bool:
        """Write ConfigMaps; whether any has changed, so that they are to be looked at once more."""
        written = False
        for name in into:
            if not self._leads():
                return False
            document = bundle_document(bundle, name, self._place.namespace, found[name].document)
            try:
                await write_configmap(self._api, document)
            except ConflictError:
                # Somebody was faster: look at what it is now.
                written = True
            except KubeError as error:
                self._say(name, Reason.BUNDLE_NOT_WRITTEN, words.not_kept(name, error))
            else:
                written = True
                log.info("bundle written", configmap=f"{name}/{CA_NAME}")
        return written

    async def _find_bundle(self, namespace: str) -> "_Found":
        try:
            return _Found(await find_configmap(self._api, namespace, CA_NAME))
        except KubeError as error:
            self._say(namespace, Reason.BUNDLE_NOT_WRITTEN, words.not_kept(namespace, error))
            return _Found(None, readable=False)

    def _state(self, found: "_Found", wanted: str) -> Bundle:
        if not found.readable:
            return Bundle.UNKNOWN
        return read_bundle(found.document, self._place.namespace, wanted)

    def _serve(self, seen: Seen) -> None:
        """Sign a certificate with the current authority if it is time, and serve with it."""
        if not isinstance(seen, Authorities):
            self._trouble(words.no_authority(seen, self._place.namespace))
            return
        now = self._clock()
        if now >= seen.current.expires_at:
            self._trouble(f"the authority in Secret {self._secret} has ended: the leader has to replace it")
            return
        self._serving.trouble = ""
        if self._leaf is not None and self._signed_by == seen.current.certificate:
            half = (self._leaf.expires_at - self._leaf.made_at) / 2
            if now < self._leaf.made_at + half:
                return
        leaf = issue(seen.current, self._place.names, self._place.addresses, now, self._times)
        self._serving.take(leaf.certificate, leaf.key)
        self._leaf, self._signed_by = leaf, seen.current.certificate
        log.info("certificate made", until=leaf.expires_at.isoformat(), name=self._place.names[0])

    def _is_ours(self, found: "_Found") -> bool:
        return found.document is not None and owner_of(found.document) == self._place.namespace

    def _say_not_ours(self, seen: Seen, decision: Decision, found: Mapping[str, "_Found"]) -> None:
        if isinstance(seen, NotOurs):
            self._say("", Reason.AUTHORITY_NOT_OURS, words.no_authority(seen, self._place.namespace))
            return
        self._said.pop("", None)
        for name in decision.not_ours:
            document = found[name].document
            owner = owner_of(document) if document else ""
            self._say(name, Reason.BUNDLE_NOT_OURS, words.not_ours(name, owner))

    def _say(self, namespace: str, reason: Reason, message: str) -> None:
        """Log it and record it as an Event, once until it is over."""
        if self._said.get(namespace) == message:
            return
        self._said[namespace] = message
        log.error("authority", reason=reason, message=message)
        self._tell(Note(reason, message, warning=True), namespace)

    def _over(self, namespaces: Iterable[str]) -> None:
        for each in namespaces:
            self._said.pop(each, None)

    def _trouble(self, trouble: str) -> None:
        if trouble != self._serving.trouble:
            log.warning("no certificate can be made now", why=trouble)
        self._serving.trouble = trouble


@dataclass(frozen=True, slots=True)
class _Found:
    document: dict[str, Any] | None
    readable: bool = True
