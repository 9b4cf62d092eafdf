"""Secret and ConfigMap: what is written is read again as it was, and what others put there is told apart."""

import base64
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from weightsync_contract.names import CA_FILE, LABEL_CA_OF
from weightsync_operator.pki.certificates import make_ca
from weightsync_operator.pki.core import Authorities, Broken, Bundle, Missing, NotOurs
from weightsync_operator.pki.stored import (
    RETIRED_AT,
    bundle_document,
    read_bundle,
    read_secret,
    secret_document,
)
from weightsync_operator.pki.times import PkiTimes

NOW = datetime(2026, 1, 1, 12, 30, 15, 250000, tzinfo=UTC)
A, B = make_ca(NOW, PkiTimes()), make_ca(NOW, PkiTimes())


@pytest.mark.parametrize(
    "authorities",
    [
        Authorities(A),
        Authorities(A, next=B),
        Authorities(A, next=B, bundled_at=NOW),
        Authorities(B, old=replace(A, key=""), retired_at=NOW),
    ],
)
def test_what_is_written_is_read_again(authorities: Authorities) -> None:
    document = secret_document(authorities, "system", None)
    assert read_secret(document, "system") == authorities
    # And over another one, of which nothing stays.
    over = secret_document(Authorities(A, next=B, bundled_at=NOW), "system", document)
    over = {**over, "metadata": {**over["metadata"], "resourceVersion": "7"}}
    again = secret_document(authorities, "system", over)
    assert read_secret(again, "system") == authorities
    assert again["metadata"]["resourceVersion"] == "7"


def test_other_peoples_labels_stay() -> None:
    document = secret_document(Authorities(A), "system", None)
    document["metadata"]["labels"]["team"] = "ml"
    document["metadata"]["annotations"]["note"] = "hello"
    metadata = secret_document(Authorities(B), "system", document)["metadata"]
    assert metadata["labels"] == {LABEL_CA_OF: "system", "team": "ml"}
    assert metadata["annotations"] == {"note": "hello"}


def changed(**data: str | None) -> dict[str, Any]:
    document = secret_document(Authorities(A, next=B), "system", None)
    for name, text in data.items():
        key = name.replace("_", ".")
        if text is None:
            del document["data"][key]
        else:
            document["data"][key] = base64.b64encode(text.encode()).decode()
    return document


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (changed(tls_key=None), "tls.crt or tls.key is missing"),
        (changed(tls_crt=None, tls_key=None), "tls.crt or tls.key is missing"),
        (changed(tls_key="x"), "tls.crt, tls.key: no private key"),
        (changed(tls_key=B.key), "the key is not the certificate's"),
        (changed(next_crt="x"), "next.crt, next.key: no certificate"),
        (changed(old_crt="x"), "no certificate"),
        ({"metadata": {"labels": {LABEL_CA_OF: "system"}}}, "missing"),
        ({"metadata": {"labels": {LABEL_CA_OF: "system"}}, "data": {"tls.crt": "%"}}, "base64|alphabet"),
    ],
)
def test_a_broken_secret_says_what_is_broken(document: dict[str, Any], why: str) -> None:
    seen = read_secret(document, "system")
    assert isinstance(seen, Broken)
    assert any(part in seen.why for part in why.split("|")), seen.why
    assert "PRIVATE" not in seen.why


def test_a_time_that_cannot_be_read_is_none() -> None:
    document = secret_document(Authorities(B, old=A, retired_at=NOW), "system", None)
    document["metadata"]["annotations"][RETIRED_AT] = "yesterday"
    seen = read_secret(document, "system")
    assert isinstance(seen, Authorities)
    assert seen.retired_at is None


@pytest.mark.parametrize("labels", [{}, None, {LABEL_CA_OF: "other"}])
def test_without_the_label_it_is_somebody_elses(labels: dict[str, str] | None) -> None:
    for document in (
        secret_document(Authorities(A), "system", None),
        bundle_document("x", "n", "system", None),
    ):
        document["metadata"]["labels"] = labels
        assert isinstance(read_secret(document, "system"), NotOurs)
        assert read_bundle(document, "system", "x") is Bundle.NOT_OURS


def test_nothing_there() -> None:
    assert read_secret(None, "system") == Missing()
    assert read_bundle(None, "system", "x") is Bundle.WRONG


def test_a_bundle_is_right_or_wrong_and_other_keys_stay() -> None:
    document = bundle_document("x", "n", "system", None)
    assert read_bundle(document, "system", "x") is Bundle.RIGHT
    assert read_bundle(document, "system", "y") is Bundle.WRONG
    document["data"]["more"] = "z"
    again = bundle_document("y", "n", "system", document)
    assert again["data"] == {CA_FILE: "y", "more": "z"}
    del document["data"]
    assert read_bundle(document, "system", "x") is Bundle.WRONG
