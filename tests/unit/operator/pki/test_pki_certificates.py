"""Certificates that are made are accepted by a real TLS handshake, and only where they should be."""

import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from weightsync_operator.pki.authority import service_names
from weightsync_operator.pki.certificates import UnusableError, issue, make_ca, read_ca, valid_until
from weightsync_operator.pki.core import Ca
from weightsync_operator.pki.serving import Serving
from weightsync_operator.pki.times import PkiTimes

TIMES = PkiTimes()
NAMES = service_names("weightsync-operator", "system")


def now() -> datetime:
    return datetime.now(UTC)


def client(bundle: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=bundle)
    # What Python 3.13 asks for by itself.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def serving(ca: Ca, made_at: datetime | None = None) -> Serving:
    made = Serving()
    leaf = issue(ca, NAMES, ["10.1.2.3"], made_at or now(), TIMES)
    made.take(leaf.certificate, leaf.key)
    return made


class Handshake:
    """Both ends in memory."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(to_server, to_client, server_side=True)
        self.client = client.wrap_bio(to_client, to_server, server_hostname=name)

    def run(self) -> None:
        """Raises ssl.SSLError as the end that refuses does."""
        for end in (self.client, self.server) * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue

    def serial(self) -> str:
        certificate = self.client.getpeercert()
        assert certificate
        return str(certificate["serialNumber"])


def serial(server: Serving, client: ssl.SSLContext, name: str = NAMES[0]) -> str:
    handshake = Handshake(server.context, client, name)
    handshake.run()
    return handshake.serial()


@pytest.mark.parametrize("name", [*NAMES, "10.1.2.3"])
def test_each_name_is_accepted(name: str) -> None:
    ca = make_ca(now(), TIMES)
    serial(serving(ca), client(ca.certificate), name)


@pytest.mark.parametrize("name", ["weightsync-operator.other.svc", "10.1.2.4", "localhost"])
def test_another_name_is_refused(name: str) -> None:
    ca = make_ca(now(), TIMES)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        serial(serving(ca), client(ca.certificate), name)


def test_a_service_may_be_given_with_its_namespace() -> None:
    assert service_names("op", "mine") == ("op", "op.mine", "op.mine.svc", "op.mine.svc.cluster.local")
    assert service_names("op.other", "mine") == service_names("op.other.svc", "mine")
    assert service_names("op.other", "mine")[2] == "op.other.svc"


def test_another_authority_is_refused() -> None:
    ca, other = make_ca(now(), TIMES), make_ca(now(), TIMES)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        serial(serving(ca), client(other.certificate))


def test_a_bundle_takes_what_either_signs() -> None:
    old, new = make_ca(now(), TIMES), make_ca(now(), TIMES)
    both = client(new.certificate + old.certificate)
    assert serial(serving(old), both) != serial(serving(new), both)


def test_a_certificate_that_has_ended_is_refused_and_makes_the_replica_not_ready() -> None:
    ca = make_ca(now() - timedelta(days=2), TIMES)
    served = serving(ca, now() - timedelta(days=1, seconds=1))
    assert "has ended at" in served.not_ready()
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        serial(served, client(ca.certificate))


def test_tls_1_2_is_refused() -> None:
    ca = make_ca(now(), TIMES)
    old = client(ca.certificate)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        serial(serving(ca), old)


def test_a_new_certificate_is_for_new_handshakes_only() -> None:
    ca = make_ca(now(), TIMES)
    served, trusting = serving(ca), client(ca.certificate)
    before = Handshake(served.context, trusting, NAMES[0])
    before.run()
    leaf = issue(ca, NAMES, [], now(), TIMES)
    served.take(leaf.certificate, leaf.key)
    after = Handshake(served.context, trusting, NAMES[0])
    after.run()
    assert before.serial() != after.serial()
    before.client.write(b"still open")
    assert before.server.read(100) == b"still open"


def test_what_cannot_be_served_changes_nothing() -> None:
    ca = make_ca(now(), TIMES)
    served, trusting = serving(ca), client(ca.certificate)
    before = serial(served, trusting)
    one, other = (issue(ca, NAMES, [], now(), TIMES) for _ in range(2))
    for certificate, key in [(one.certificate, other.key), (b"none", one.key), (one.certificate, b"none")]:
        with pytest.raises(UnusableError):
            served.take(certificate, key)
    assert serial(served, trusting) == before
    assert served.not_ready() == ""


def test_no_certificate_is_not_ready() -> None:
    served = Serving()
    served.trouble = "no Secret"
    assert served.not_ready() == "no certificate for the session yet: no Secret"
    with pytest.raises(ssl.SSLError):
        serial(served, client(make_ca(now(), TIMES).certificate))


def test_a_certificate_never_outlives_its_authority() -> None:
    ca = make_ca(now(), TIMES)
    nearly = ca.expires_at - timedelta(hours=1)
    leaf = issue(ca, NAMES, [], nearly, TIMES)
    assert leaf.expires_at == ca.expires_at == valid_until(leaf.certificate)


def test_a_clock_that_is_behind_is_forgiven() -> None:
    ca = make_ca(now(), TIMES)
    assert read_ca(ca.certificate, ca.key).made_at <= now() - timedelta(seconds=TIMES.skew)


def test_an_authority_is_read_as_it_was_made() -> None:
    ca = make_ca(now(), TIMES)
    assert read_ca(ca.certificate, ca.key) == ca
    assert "PRIVATE" not in repr(ca)


def test_what_is_no_authority_is_refused() -> None:
    ca, other = make_ca(now(), TIMES), make_ca(now(), TIMES)
    leaf = issue(ca, NAMES, [], now(), TIMES)
    for certificate, key, why in [
        ("", ca.key, "no certificate"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ca.key, "no certificate"),
        (ca.certificate, "nothing", "no private key"),
        (ca.certificate, other.key, "not the certificate's"),
        (leaf.certificate.decode(), leaf.key.decode(), "no authority's"),
    ]:
        with pytest.raises(UnusableError, match=why):
            read_ca(certificate, key)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"grace": 0.0}, "above zero"),
        ({"check": 30000.0}, "four times in its life"),
        ({"authority": 86400.0}, "too short to be rotated"),
        ({"authority": 7 * 86400.0, "grace": 86400.0}, "too short to be rotated"),
    ],
)
def test_times_that_break_dials_are_refused(changes: dict[str, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(TIMES, **changes)
