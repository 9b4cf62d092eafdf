"""The cluster's certificate authority, and files that let their holder in."""

import base64
import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weightsync_demo.kube.credentials import write_private

# No cluster is kept for as long.
VALID = datetime.timedelta(days=365)
# Clocks may differ, and go back.
EARLIER = datetime.timedelta(hours=1)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_text(key: ec.EllipticCurvePrivateKey) -> str:
    """PEM; the form that all of Kubernetes reads."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    ).decode()


@dataclass(frozen=True)
class Leaf:
    """A certificate and its key, as PEM."""

    certificate: str
    key: str

    def write(self, path: Path) -> None:
        """Write `path`.crt and `path`.key."""
        write_private(path.with_suffix(".crt"), self.certificate)
        write_private(path.with_suffix(".key"), self.key)


class Authority:
    """A new certificate authority."""

    def __init__(self, name: str) -> None:
        self._key = new_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def own(self) -> Leaf:
        """The authority's own certificate and key."""
        return Leaf(_text(self._certificate), key_text(self._key))

    def issue(self, name: str, *, groups: Sequence[str] = (), serves: Sequence[str] = ()) -> Leaf:
        """A certificate for the user `name`, or for a server at the names and addresses in `serves`."""
        key = new_key()
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, name)])
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            self._builder(subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if serves:
            names = x509.SubjectAlternativeName([_general_name(text) for text in serves])
            builder = builder.add_extension(names, critical=False)
        return Leaf(_text(builder.sign(self._key, hashes.SHA256())), key_text(key))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLIER)
            .not_valid_after(now + VALID)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(own, critical=False)
        )


def write_kubeconfig(path: Path, url: str, authority: Authority, user: Leaf, context: str) -> None:
    """Write a kubeconfig that needs no other file, for `user`, with one context, in the namespace default."""
    cluster = {"server": url, "certificate-authority-data": _base64(authority.own.certificate)}
    holder = {
        "client-certificate-data": _base64(user.certificate),
        "client-key-data": _base64(user.key),
    }
    place = {"cluster": context, "user": context, "namespace": "default"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "clusters": [{"name": context, "cluster": cluster}],
        "users": [{"name": context, "user": holder}],
        "contexts": [{"name": context, "context": place}],
    }
    write_private(path, yaml.safe_dump(config, sort_keys=False))


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
