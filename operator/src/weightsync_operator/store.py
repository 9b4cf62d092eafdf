"""What the API server has, as far as this process knows: WeightSyncs and pods by uid.

Watch events and LISTs come in any order. A newer resourceVersion wins, a LIST removes what it does not hold
unless that is newer than the LIST, and a uid that was deleted never comes back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from weightsync_contract import logs
from weightsync_operator.core.model import PodView
from weightsync_operator.documents import Stored, parse_pod, parse_weightsync

log = logs.get(__name__)

Key = tuple[str, str]
"""Namespace and name of a WeightSync."""

_TOMBSTONES: Final = 20_000


@dataclass(slots=True)
class _Pod:
    version: str
    view: PodView


class Store:
    """Belongs to one event loop. What changes something answers True, so that the caller can enqueue."""

    def __init__(self) -> None:
        self._weightsyncs: dict[str, Stored] = {}
        self._uids: dict[Key, str] = {}
        self._pods: dict[str, _Pod] = {}
        self._gone: dict[str, None] = {}

    def weightsync(self, key: Key) -> Stored | None:
        uid = self._uids.get(key)
        return self._weightsyncs.get(uid) if uid is not None else None

    def weightsyncs(self, namespace: str = "") -> list[Stored]:
        """All of them, or those of one namespace."""
        return [each for each in self._weightsyncs.values() if namespace in ("", each.ref.namespace)]

    def pod(self, uid: str) -> PodView | None:
        entry = self._pods.get(uid)
        return entry.view if entry else None

    def pods(self, namespace: str = "") -> list[PodView]:
        """All pods with a role, or those of one namespace."""
        return [each.view for each in self._pods.values() if namespace in ("", each.view.namespace)]

    def put_weightsync(self, document: Mapping[str, Any]) -> bool:
        metadata = document["metadata"]
        uid, key = metadata["uid"], (metadata["namespace"], metadata["name"])
        known = self._weightsyncs.get(uid)
        if uid in self._gone or (
            known is not None and not _newer(metadata["resourceVersion"], known.resource_version)
        ):
            return False
        try:
            parsed = parse_weightsync(document)
        except (ValueError, KeyError, TypeError) as error:
            log.error("weightsync unreadable", namespace=key[0], name=key[1], error=error)
            return False
        before = self._uids.get(key)
        if before is not None and before != uid:
            self.drop_weightsync(before)
        self._weightsyncs[uid] = parsed
        self._uids[key] = uid
        return True

    def drop_weightsync(self, uid: str) -> bool:
        self._bury(uid)
        gone = self._weightsyncs.pop(uid, None)
        if gone is not None and self._uids.get(gone.key) == uid:
            del self._uids[gone.key]
        return gone is not None

    def put_pod(self, document: Mapping[str, Any]) -> bool:
        metadata = document["metadata"]
        uid, version = metadata["uid"], metadata["resourceVersion"]
        known = self._pods.get(uid)
        if uid in self._gone or (known is not None and not _newer(version, known.version)):
            return False
        view = parse_pod(document)
        changed = known is None or known.view != view
        self._pods[uid] = _Pod(version, view)
        return changed

    def drop_pod(self, uid: str) -> bool:
        self._bury(uid)
        return self._pods.pop(uid, None) is not None

    def listed_weightsyncs(
        self, documents: Iterable[Mapping[str, Any]], version: str, namespace: str = ""
    ) -> list[Stored]:
        """Take a LIST as the truth; answers those that are gone by it."""
        present = set()
        for document in documents:
            present.add(document["metadata"]["uid"])
            self.put_weightsync(document)
        gone = [
            each
            for each in self.weightsyncs(namespace)
            if each.ref.uid not in present and not _newer(each.resource_version, version)
        ]
        for each in gone:
            self.drop_weightsync(each.ref.uid)
        return gone

    def listed_pods(
        self, documents: Iterable[Mapping[str, Any]], version: str, namespace: str = ""
    ) -> list[PodView]:
        """Take a LIST as the truth; answers those that are gone by it."""
        present = set()
        for document in documents:
            present.add(document["metadata"]["uid"])
            self.put_pod(document)
        gone = [
            each.view
            for uid, each in self._pods.items()
            if namespace in ("", each.view.namespace)
            and uid not in present
            and not _newer(each.version, version)
        ]
        for view in gone:
            self.drop_pod(view.uid)
        return gone

    def _bury(self, uid: str) -> None:
        self._gone[uid] = None
        while len(self._gone) > _TOMBSTONES:
            del self._gone[next(iter(self._gone))]


def _newer(version: str, than: str) -> bool:
    """Whether a resourceVersion is later; versions that are no numbers differ at most."""
    try:
        return int(version) > int(than)
    except ValueError:
        return version != than
