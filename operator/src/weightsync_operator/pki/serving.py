"""The TLS side of the session server: one context, whose certificate changes under it.

A handshake takes the certificate that the context has then; a session that is open keeps the one that it was
opened with. So nothing restarts and nothing is closed.
"""

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from weightsync_operator.pki.certificates import UnusableError, valid_until


def wall() -> datetime:
    """The time that certificates are dated by."""
    return datetime.now(UTC)


class Serving:
    """A context that takes TLS 1.3 only. Until the first certificate every handshake fails."""

    def __init__(self, clock: Callable[[], datetime] = wall) -> None:
        self.context = _context()
        self._clock = clock
        self._valid_until: datetime | None = None
        self.trouble = ""
        """Why there may soon be, or is, no certificate."""

    def take(self, certificate: bytes, key: bytes) -> datetime:
        """Serve with this chain and key (PEM) from now on; answers when they end.

        Raises UnusableError, and goes on with what it had.
        """
        ends = valid_until(certificate)
        with _in_memory(certificate) as chain, _in_memory(key) as private:
            # First elsewhere: a context that refuses a key has taken the certificate already.
            for context in (_context(), self.context):
                try:
                    context.load_cert_chain(chain, private, password=_no_password)
                except (ssl.SSLError, ValueError) as error:
                    raise UnusableError(
                        f"certificate and key can't be served with: {error}. They must be PEM, the key "
                        "unencrypted and the certificate's own"
                    ) from error
        self._valid_until = ends
        return ends

    def not_ready(self) -> str:
        """Why agents can't be served now; empty if they can."""
        if self._valid_until is None:
            return f"no certificate for the session yet: {self.trouble or 'it is being made'}"
        if self._clock() >= self._valid_until:
            more = f": {self.trouble}" if self.trouble else ""
            return f"the session's certificate has ended at {self._valid_until:%Y-%m-%dT%H:%M:%SZ}{more}"
        return ""


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _no_password() -> str:
    # Without this OpenSSL would ask the terminal.
    raise ValueError("the key is encrypted")


@contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    """Bytes as a file that is on no disk: the root may be read-only, and a key needs no copy."""
    descriptor = os.memfd_create("weightsync-tls", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
