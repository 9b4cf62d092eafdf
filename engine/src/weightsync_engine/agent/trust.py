"""Whom the agent takes for its operator: the authorities it checks with, and what to do when a check fails."""

import ssl
from pathlib import Path
from typing import Final

import aiohttp

_NOT_YET_VALID: Final = 9
_ENDED: Final = 10
_UNKNOWN_ISSUER: Final = (18, 19, 20, 21)
_WRONG_NAME: Final = (62, 64)
"""OpenSSL's numbers of verification errors."""


class TrustError(ValueError):
    """There is nothing to check the operator's certificate with."""


def context_of(bundle: Path | None) -> ssl.SSLContext:
    """A context that trusts the authorities in ``bundle`` and no others; the system's if it is None.

    Raises TrustError. Read at each dial, so that a new bundle needs no restart.
    """
    if bundle is None:
        return ssl.create_default_context()
    try:
        text = bundle.read_text()
    except FileNotFoundError:
        raise TrustError(
            f"{bundle} is not there: the operator writes the ConfigMap weightsync-ca once there is a WeightSync in "
            "this namespace, and the kubelet brings it into the pod some two minutes later"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrustError(f"{bundle} can't be read: {error}") from error
    if not text.strip():
        # Without a word create_default_context would trust the system's authorities.
        raise TrustError(f"{bundle} is empty: it must hold the operator's authorities (PEM)")
    try:
        return ssl.create_default_context(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise TrustError(f"{bundle} holds no certificates (PEM): {error}") from error


def explain(error: BaseException, url: str, bundle: Path | None) -> str:
    """Why a dial of ``url`` failed, and what to do about it; empty if it has nothing to do with trust."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _unverified(error.certificate_error, url, bundle)
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return _no_handshake(error, url)
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionResetError):
        return _no_handshake(error, url) if url.startswith("wss:") else ""
    if isinstance(error, aiohttp.ServerDisconnectedError) and url.startswith("ws:"):
        return f"{url} hung up without an answer: if the operator has a certificate, it takes wss:// only"
    return ""


def _unverified(error: Exception, url: str, bundle: Path | None) -> str:
    code = getattr(error, "verify_code", None)
    reason = getattr(error, "verify_message", "") or str(error)
    checked = f"{bundle}" if bundle else "the system's authorities"
    if code in _UNKNOWN_ISSUER:
        what = (
            f"no authority in {checked} has signed it. Either another operator answers there, or its authority was "
            "replaced and the new bundle is not in this pod yet (some two minutes); see ConfigMap weightsync-ca"
        )
    elif code in _WRONG_NAME:
        what = (
            "it is not for that name: dial the Service that the operator's --session-service names, or let its "
            "certificate hold this name"
        )
    elif code == _ENDED:
        what = "it has ended: see the operator's log and /readyz, and this machine's clock"
    elif code == _NOT_YET_VALID:
        what = "it is not valid yet: compare this machine's clock with the operator's"
    else:
        what = f"it was not accepted; checked with {checked}"
    return f"the operator's certificate at {url} is refused ({reason}): {what}"


def _no_handshake(error: aiohttp.ClientConnectorError, url: str) -> str:
    # asyncio's server hangs up without an alert, and aiohttp has no words for that.
    text = str(error.os_error) or "it hung up in the handshake"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text.lower():
        return f"{url} speaks no TLS: start the operator with --session-service, or dial ws://"
    return f"no TLS with {url}: {text}. While an operator has no certificate it takes nobody: see its /readyz"
