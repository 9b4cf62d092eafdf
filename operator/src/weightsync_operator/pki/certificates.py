"""Certificates made and read: EC P-256, which every TLS 1.3 library takes and signs within a fraction of a millisecond.

Their extensions are those that OpenSSL's strict checking asks for, which Python 3.13 turns on.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weightsync_operator.pki.core import Ca
from weightsync_operator.pki.times import PkiTimes

_HASH: Final = hashes.SHA256()
_LONGEST_NAME: Final = 64


class UnusableError(ValueError):
    """A certificate or key that can't be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A serving certificate with its chain, and its key; PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    made_at: datetime
    expires_at: datetime


def make_ca(now: datetime, times: PkiTimes) -> Ca:
    """A new authority that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # Two authorities with one name would be told apart by their key identifiers only.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"weightsync-ca-{serial:x}"[:_LONGEST_NAME])])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    begins, ends = _life(now, times.skew, times.authority)
    certificate = (
        _builder(name, name, key.public_key(), serial, begins, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(key, _HASH)
    )
    return Ca(certificate.public_bytes(Encoding.PEM).decode(), _pem(key).decode(), begins, ends)


def issue(ca: Ca, names: Sequence[str], addresses: Sequence[str], now: datetime, times: PkiTimes) -> Leaf:
    """A serving certificate for DNS names and IP addresses; it never outlives the authority.

    Raises UnusableError if the authority can't sign.
    """
    authority, authority_key = _read_certificate(ca.certificate), _read_key(ca.key)
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    common = next(iter(names), "weightsync-operator")[:_LONGEST_NAME]
    begins, ends = _life(now, times.skew, times.certificate)
    ends = min(ends, ca.expires_at)
    certificate = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]),
            authority.subject,
            key.public_key(),
            x509.random_serial_number(),
            begins,
            ends,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
        .sign(authority_key, _HASH)
    )
    return Leaf(certificate.public_bytes(Encoding.PEM), _pem(key), now, ends)


def read_ca(certificate: str, key: str) -> Ca:
    """An authority as it was stored; one without a key is only trusted. Raises UnusableError."""
    read = _read_certificate(certificate)
    try:
        is_authority = read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        read.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (x509.ExtensionNotFound, ValueError) as error:
        raise UnusableError(f"the certificate is no authority's: {error}") from error
    if not is_authority:
        raise UnusableError("the certificate is no authority's: it may not sign others")
    if key and _read_key(key).public_key() != read.public_key():
        raise UnusableError("the key is not the certificate's")
    return Ca(certificate, key, read.not_valid_before_utc, read.not_valid_after_utc)


def valid_until(chain: bytes) -> datetime:
    """When a chain's first certificate ends. Raises UnusableError."""
    return _read_certificate(chain.decode(errors="replace")).not_valid_after_utc


def _life(now: datetime, skew: float, seconds: float) -> tuple[datetime, datetime]:
    # Certificates have whole seconds. Backdated, for the agent whose clock is behind.
    begins = (now - timedelta(seconds=skew)).replace(microsecond=0)
    return begins, (now + timedelta(seconds=seconds)).replace(microsecond=0)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    begins: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(begins.astimezone(UTC))
        .not_valid_after(ends.astimezone(UTC))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_certificate(text: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError as error:
        raise UnusableError(f"no certificate (PEM) can be read: {error}") from error


def _read_key(text: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UnusableError(f"no private key (PEM) can be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UnusableError("the private key is none on an elliptic curve")
    return key
