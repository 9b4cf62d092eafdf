"""The authority's Secret and ConfigMaps: documents to what is decided on, and back. Pure."""

import base64
import binascii
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from weightsync_contract.names import CA_FILE, CA_NAME, GROUP, LABEL_CA_OF
from weightsync_operator.pki.certificates import UnusableError, read_ca
from weightsync_operator.pki.core import Authorities, Broken, Bundle, Ca, Missing, NotOurs, Seen

BUNDLED_AT: Final = f"{GROUP}/bundled-at"
RETIRED_AT: Final = f"{GROUP}/retired-at"
_PARTS: Final = ("tls.crt", "tls.key", "next.crt", "next.key", "old.crt")

Document = Mapping[str, Any]


def read_secret(document: Document | None, namespace: str) -> Seen:
    """What the Secret says to the operator of ``namespace``; None for one that is not there."""
    if document is None:
        return Missing()
    if not _is_ours(document, namespace):
        return NotOurs()
    data = document.get("data") or {}
    try:
        parts = {name: base64.b64decode(data.get(name, ""), validate=True).decode() for name in _PARTS}
    except (binascii.Error, UnicodeDecodeError) as error:
        return Broken(str(error))
    annotations = document["metadata"].get("annotations") or {}
    try:
        current = _part(parts, "tls")
        if current is None:
            raise UnusableError("tls.crt or tls.key is missing")
        return Authorities(
            current,
            next=_part(parts, "next"),
            bundled_at=_time(annotations.get(BUNDLED_AT)),
            old=read_ca(parts["old.crt"], "") if parts["old.crt"] else None,
            retired_at=_time(annotations.get(RETIRED_AT)),
        )
    except ValueError as error:
        return Broken(str(error))


def secret_document(authorities: Authorities, namespace: str, over: Document | None) -> dict[str, Any]:
    """The Secret to write; ``over`` is the one that was read, whose other labels and annotations stay."""
    parts = {"tls.crt": authorities.current.certificate, "tls.key": authorities.current.key}
    if authorities.next:
        parts |= {"next.crt": authorities.next.certificate, "next.key": authorities.next.key}
    if authorities.old:
        parts["old.crt"] = authorities.old.certificate
    metadata = _metadata(namespace, namespace, over)
    times = {BUNDLED_AT: authorities.bundled_at, RETIRED_AT: authorities.retired_at}
    kept = {name: text for name, text in metadata.get("annotations", {}).items() if name not in times}
    metadata["annotations"] = {**kept, **{name: at.isoformat() for name, at in times.items() if at}}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "kubernetes.io/tls" if over is None else over.get("type", "Opaque"),
        "data": {name: base64.b64encode(text.encode()).decode() for name, text in parts.items()},
    }


def read_bundle(document: Document | None, namespace: str, wanted: str) -> Bundle:
    """A namespace's ConfigMap (None: not there), to the operator of ``namespace`` that wants this text in it."""
    if document is None:
        return Bundle.WRONG
    if not _is_ours(document, namespace):
        return Bundle.NOT_OURS
    return Bundle.RIGHT if (document.get("data") or {}).get(CA_FILE) == wanted else Bundle.WRONG


def bundle_document(text: str, into: str, namespace: str, over: Document | None) -> dict[str, Any]:
    """The ConfigMap to write into namespace ``into`` by the operator of ``namespace``."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(into, namespace, over),
        "data": {**((over or {}).get("data") or {}), CA_FILE: text},
    }


def owner_of(document: Document) -> str:
    """The namespace of the operator that a Secret or ConfigMap belongs to; empty for somebody else's."""
    return str((document["metadata"].get("labels") or {}).get(LABEL_CA_OF, ""))


def _is_ours(document: Document, namespace: str) -> bool:
    return owner_of(document) == namespace


def _metadata(into: str, namespace: str, over: Document | None) -> dict[str, Any]:
    before = dict(over["metadata"]) if over else {}
    return {
        **before,
        "name": CA_NAME,
        "namespace": into,
        "labels": {**(before.get("labels") or {}), LABEL_CA_OF: namespace},
        "annotations": dict(before.get("annotations") or {}),
    }


def _part(parts: Mapping[str, str], name: str) -> Ca | None:
    certificate, key = parts[f"{name}.crt"], parts[f"{name}.key"]
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise UnusableError(f"{name}.crt or {name}.key is missing")
    try:
        return read_ca(certificate, key)
    except UnusableError as error:
        raise UnusableError(f"{name}.crt, {name}.key: {error}") from error


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        # As if it had not been written: the step that waits for it waits once more.
        return None
    return read if read.tzinfo else read.replace(tzinfo=UTC)
