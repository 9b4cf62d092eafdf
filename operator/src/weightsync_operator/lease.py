"""Which replica leads: a coordination Lease, and the time until which it may be relied on.

Nobody compares wall clocks. A replica takes the Lease when it has not seen it change for the Lease's
duration by its own monotonic clock; the holder stops relying on it earlier, counted from before its last
successful renewal.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from weightsync_contract import logs
from weightsync_contract.names import LEASE_NAME
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.errors import ConflictError, KubeError, NotFoundError
from weightsync_operator.kube.leases import LeaseRecord, create_lease, get_lease, lease_time, put_lease

log = logs.get(__name__)

RELEASES = 3
"""How often an ending leader tries to give the Lease up."""


class LeaseLostError(Exception):
    """This process no longer leads and must end: it may not know what the new leader does."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """In seconds. ``renew`` must stay below ``duration``: the difference is how late a leader may notice."""

    duration: float = 15.0
    renew: float = 10.0
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.renew < self.duration:
            raise ValueError(
                f"lease times must grow from retry to renew to duration, not {self.retry:g}, {self.renew:g}, "
                f"{self.duration:g}"
            )


class Elector:
    """One replica's part in the election. ``identity`` must differ between all processes there ever are."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        identity: str,
        address: str,
        times: LeaseTimes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self.leader_address = ""
        """Where the leader's session server listens, as far as this follower knows."""
        self.elected = asyncio.Event()
        self._api = api
        self._namespace = namespace
        self._address = address
        self._times = times
        self._clock = clock
        self._renewed_at = float("-inf")
        self._seen: LeaseRecord | None = None
        self._seen_at = 0.0

    def valid(self) -> bool:
        """Whether this process leads for certain, now. Asked before each send and each write."""
        return self.elected.is_set() and self._clock() < self._renewed_at + self._times.renew

    async def run(self) -> None:
        """Follow, then lead. Raises LeaseLostError; never returns."""
        while True:
            if await self._try_to_acquire():
                break
            await asyncio.sleep(self._times.retry * random.uniform(0.8, 1.2))
        log.info("leading", identity=self.identity)
        self.elected.set()
        while True:
            await asyncio.sleep(self._times.retry)
            await self._renew()

    async def release(self) -> None:
        """Give the Lease up: another replica need not wait for its end. Nothing may be sent afterwards."""
        held, self._renewed_at = self._seen if self.elected.is_set() else None, float("-inf")
        for _ in range(RELEASES):
            if held is None or held.holder != self.identity:
                return
            try:
                await self._put(replace(held, holder="", duration_seconds=1, renew_time=lease_time()))
                return
            except ConflictError:
                # Most likely a renewal of our own that was under way when this process was told to end.
                held = await self._read_or_none()
            except KubeError as error:
                log.warning("lease not released", error=error)
                return
        log.warning("lease not released", error=f"it was changed {RELEASES} times meanwhile")

    async def _read_or_none(self) -> LeaseRecord | None:
        try:
            return await get_lease(self._api, self._namespace, LEASE_NAME, self._times.retry)
        except KubeError as error:
            log.warning("lease not readable", error=error)
            return None

    async def _try_to_acquire(self) -> bool:
        started = self._clock()
        try:
            self._see(await get_lease(self._api, self._namespace, LEASE_NAME, self._times.retry))
            if self._seen is None or not self._is_free(self._seen):
                return False
            taken = replace(
                self._seen,
                holder=self.identity,
                address=self._address,
                duration_seconds=self._duration_seconds(),
                acquire_time=lease_time(),
                renew_time=lease_time(),
                transitions=self._seen.transitions + 1,
            )
            started = self._clock()
            self._see(await self._put(taken))
        except NotFoundError:
            # Somebody deleted it: its holder, if there was one, does not know yet.
            return self._is_free(self._seen) and await self._try_to_create()
        except ConflictError:
            return False
        except KubeError as error:
            log.warning("lease not readable", error=error)
            return False
        self._renewed_at = started
        return True

    async def _try_to_create(self) -> bool:
        started = self._clock()
        try:
            made = await create_lease(
                self._api,
                self._namespace,
                LEASE_NAME,
                self.identity,
                self._address,
                self._duration_seconds(),
                self._times.retry,
            )
        except ConflictError:
            return False
        except KubeError as error:
            log.warning("lease not made", namespace=self._namespace, error=error)
            return False
        self._see(made)
        self._renewed_at = started
        return True

    async def _renew(self) -> None:
        started = self._clock()
        assert self._seen is not None
        try:
            self._see(await self._put(replace(self._seen, renew_time=lease_time())))
            self._renewed_at = started
        except ConflictError:
            await self._look_who_holds()
        except KubeError as error:
            log.warning("lease not renewed", error=error)
        if not self.valid():
            raise LeaseLostError(f"the Lease could not be renewed within {self._times.renew:g} s")

    async def _look_who_holds(self) -> None:
        """After a conflict: an own write whose answer was lost, somebody's annotation, or another leader."""
        try:
            self._see(await get_lease(self._api, self._namespace, LEASE_NAME, self._times.retry))
        except KubeError as error:
            log.warning("lease not readable", error=error)
            return
        if self._seen is None or self._seen.holder != self.identity:
            raise LeaseLostError(f"{self._seen.holder if self._seen else 'nobody'} holds the Lease")

    def _see(self, record: LeaseRecord) -> None:
        if self._seen is None or record.resource_version != self._seen.resource_version:
            self._seen, self._seen_at = record, self._clock()
        self.leader_address = record.address if record.holder else ""

    def _is_free(self, record: LeaseRecord | None) -> bool:
        if record is None or record.holder in ("", self.identity):
            return True
        return self._clock() >= self._seen_at + max(record.duration_seconds, self._times.duration)

    async def _put(self, record: LeaseRecord) -> LeaseRecord:
        return await put_lease(self._api, self._namespace, LEASE_NAME, record, self._times.retry)

    def _duration_seconds(self) -> int:
        return max(1, round(self._times.duration))
