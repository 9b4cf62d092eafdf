"""A certificate in files that somebody replaces."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from weightsync_operator.pki.certificates import Leaf, UnusableError, issue, make_ca
from weightsync_operator.pki.files import CertificateFiles
from weightsync_operator.pki.serving import Serving
from weightsync_operator.pki.times import PkiTimes

TIMES = PkiTimes()


class Recording(Serving):
    def __init__(self) -> None:
        super().__init__()
        self.taken: list[bytes] = []

    def take(self, certificate: bytes, key: bytes) -> datetime:
        ends = super().take(certificate, key)
        self.taken.append(certificate)
        return ends


def leaf() -> Leaf:
    now = datetime.now(UTC)
    return issue(make_ca(now, TIMES), ["op"], [], now, TIMES)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "tls.crt", tmp_path / "tls.key"


def write(files: tuple[Path, Path], leaf: Leaf) -> None:
    files[0].write_bytes(leaf.certificate)
    files[1].write_bytes(leaf.key)


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def test_files_that_change_are_served(files: tuple[Path, Path]) -> None:
    first, second = leaf(), leaf()
    write(files, first)
    serving = Recording()
    reading = asyncio.create_task(CertificateFiles(serving, *files, check_seconds=0.02).run())
    try:
        # Half of a replacement is served by nobody, and said.
        files[0].write_bytes(second.certificate)
        await until(lambda: "can't be served with" in serving.trouble)
        assert serving.not_ready() == ""
        files[1].unlink()
        await until(lambda: "No such file" in serving.trouble)
        files[1].write_bytes(second.key)
        await until(lambda: len(serving.taken) == 2)
        await until(lambda: serving.trouble == "")
        assert serving.taken == [first.certificate, second.certificate]
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def test_nothing_to_begin_with_is_an_error(files: tuple[Path, Path]) -> None:
    with pytest.raises(UnusableError, match=r"can't be read: .*tls\.crt"):
        CertificateFiles(Serving(), *files)
    write(files, leaf())
    files[1].write_text("nothing")
    with pytest.raises(UnusableError, match="can't be served with"):
        CertificateFiles(Serving(), *files)


def test_an_encrypted_key_is_an_error_and_asks_nobody(files: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    made = leaf()
    write(files, made)
    key = load_pem_private_key(made.key, None)
    files[1].write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(UnusableError, match="encrypted"):
        CertificateFiles(Serving(), *files)
