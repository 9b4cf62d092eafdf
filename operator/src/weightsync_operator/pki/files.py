"""A certificate and key that somebody else keeps, in files that he may replace at any time."""

import asyncio
from pathlib import Path
from typing import Final

from weightsync_contract import logs
from weightsync_operator.pki.certificates import UnusableError
from weightsync_operator.pki.serving import Serving

log = logs.get(__name__)

CHECK_SECONDS: Final = 10.0
"""A kubelet takes longer to bring a changed Secret."""


class CertificateFiles:
    """Has ``serving`` serve with what the files hold. Raises UnusableError if that can't be."""

    def __init__(
        self, serving: Serving, certificate: Path, key: Path, check_seconds: float = CHECK_SECONDS
    ) -> None:
        self._serving = serving
        self._certificate = certificate
        self._key = key
        self._check_seconds = check_seconds
        try:
            self._served = self._read()
        except OSError as error:
            raise UnusableError(f"the session's certificate can't be read: {error}") from error
        serving.take(*self._served)

    async def run(self) -> None:
        """Read the files again, for ever. What can't be used changes nothing and is said once."""
        while True:
            await asyncio.sleep(self._check_seconds)
            try:
                pair = await asyncio.to_thread(self._read)
                if pair != self._served:
                    ends = self._serving.take(*pair)
                    self._served = pair
                    log.info("certificate replaced", file=self._certificate, until=ends.isoformat())
                self._serving.trouble = ""
            except (OSError, UnusableError) as error:
                self._say(f"{self._certificate}, {self._key}: {error}")

    def _read(self) -> tuple[bytes, bytes]:
        return self._certificate.read_bytes(), self._key.read_bytes()

    def _say(self, trouble: str) -> None:
        if trouble != self._serving.trouble:
            log.error("certificate not replaced, the last one is served on", why=trouble)
        self._serving.trouble = trouble
