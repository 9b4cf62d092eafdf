"""Copies of versions: kept, found again after a restart, dropped when they should be."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from weightsync_contract.manifest import Manifest, ManifestError
from weightsync_contract.messages import Published, VersionId
from weightsync_contract.reasons import PublishCode
from weightsync_engine.digest import digest_image
from weightsync_engine.publish.store import VersionNotRetainedError, VersionStore

MANIFEST = Manifest.from_lists(["a", "b"], ["float32", "uint8"], [[100], [7]])


def image(seed: int) -> bytes:
    return bytes([seed]) * MANIFEST.nbytes


def put(store: VersionStore, version: int, run: str = "run", seed: int | None = None) -> Published:
    writing = store.begin(VersionId(run, version), MANIFEST)
    data = image(version if seed is None else seed)
    writing.write(memoryview(data[:300]))
    writing.write(memoryview(data[300:]))
    return writing.seal()


def kept(store: VersionStore) -> list[str]:
    return [str(each.version) for each in store.versions()]


def read(store: VersionStore, version: VersionId) -> bytes:
    with store.open(version) as stored:
        return os.pread(stored.fd, stored.manifest.nbytes, 0)


def test_a_copy_is_what_was_written_and_its_digest_is_of_it(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    published = put(store, 3)
    assert published == Published(
        VersionId("run", 3), MANIFEST.layout, digest_image(MANIFEST.layout, image(3)), MANIFEST.nbytes, 2
    )
    assert read(store, published.version) == image(3)


def test_the_newest_are_kept_and_the_rest_is_gone_from_the_directory(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.set_retained(2)
    for version in (1, 2, 3):
        put(store, version)
    assert kept(store) == ["run/2", "run/3"]
    assert not list(tmp_path.glob("run@1*"))
    with pytest.raises(VersionNotRetainedError, match="kept are run/2, run/3"):
        read(store, VersionId("run", 1))


def test_fewer_are_kept_as_soon_as_that_is_said(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.set_retained(3)
    for version in (1, 2, 3):
        put(store, version)
    store.set_retained(1)
    assert kept(store) == ["run/3"]


def test_what_is_being_sent_is_not_dropped_before_that_is_over(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.set_retained(1)
    put(store, 1)
    store.pin(VersionId("run", 1))
    put(store, 2)
    assert kept(store) == ["run/1", "run/2"]
    assert read(store, VersionId("run", 1)) == image(1)
    store.unpin(VersionId("run", 1))
    assert kept(store) == ["run/2"]


def test_a_copy_is_not_dropped_while_it_is_open(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.set_retained(1)
    put(store, 1)
    with store.open(VersionId("run", 1)) as stored:
        put(store, 2)
        assert os.pread(stored.fd, 4, 0) == image(1)[:4]
        assert "run/1" in kept(store)
    assert kept(store) == ["run/2"]


def test_copies_and_their_order_outlive_a_restart(tmp_path: Path) -> None:
    before = VersionStore(tmp_path)
    put(before, 9, run="zz")
    put(before, 1, run="aa")
    after = VersionStore(tmp_path)
    assert kept(after) == ["zz/9", "aa/1"]
    assert read(after, VersionId("zz", 9)) == image(9)


def test_what_was_half_written_is_gone_after_a_restart(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    put(store, 1)
    writing = store.begin(VersionId("run", 2), MANIFEST)
    writing.write(memoryview(image(2)[:300]))
    after = VersionStore(tmp_path)
    assert kept(after) == ["run/1"]
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("what", ["image gone", "image short", "description torn"])
def test_a_damaged_copy_is_dropped_at_a_restart_and_the_others_stay(tmp_path: Path, what: str) -> None:
    store = VersionStore(tmp_path)
    put(store, 1)
    put(store, 2)
    path = tmp_path / "run@2.image"
    match what:
        case "image gone":
            path.unlink()
        case "image short":
            os.truncate(path, 100)
        case _:
            (tmp_path / "run@2.json").write_text('{"published"')
    assert kept(VersionStore(tmp_path)) == ["run/1"]


def test_a_copy_whose_bytes_have_changed_is_found_when_it_is_opened_after_a_restart(tmp_path: Path) -> None:
    put(VersionStore(tmp_path), 1)
    path = tmp_path / "run@1.image"
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    store = VersionStore(tmp_path)
    with pytest.raises(VersionNotRetainedError, match="damaged"):
        read(store, VersionId("run", 1))
    assert kept(store) == []


def test_the_same_bytes_again_are_fine_and_other_bytes_are_a_conflict(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    first = put(store, 1)
    assert put(store, 1) == first
    with pytest.raises(ManifestError, match="other bytes") as refused:
        put(store, 1, seed=99)
    assert refused.value.code is PublishCode.VERSION_CONFLICT
    assert read(store, VersionId("run", 1)) == image(1)
    assert not list(tmp_path.glob(".writing-*"))


def test_other_bytes_are_a_conflict_also_when_the_copy_is_gone_and_the_agent_restarted(
    tmp_path: Path,
) -> None:
    store = VersionStore(tmp_path)
    store.set_retained(1)
    put(store, 1)
    put(store, 2)
    assert kept(store) == ["run/2"]
    with pytest.raises(ManifestError) as refused:
        put(VersionStore(tmp_path), 1, seed=99)
    assert refused.value.code is PublishCode.VERSION_CONFLICT


def test_a_full_volume_is_told_with_numbers_before_a_byte_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VersionStore(tmp_path)
    usage = namedtuple("usage", ["total", "used", "free"])
    # A fake: a volume that is really full can't be had without rights.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(ManifestError, match="1,000 free") as refused:
        store.begin(VersionId("run", 1), MANIFEST)
    assert refused.value.code is PublishCode.NO_SPACE
    assert not list(tmp_path.iterdir())


def test_an_aborted_copy_leaves_nothing(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    writing = store.begin(VersionId("run", 1), MANIFEST)
    writing.write(memoryview(image(1)))
    writing.abort()
    writing.abort()
    assert kept(store) == []
    assert not list(tmp_path.iterdir())


def test_an_old_version_again_does_not_come_to_stand_before_what_followed_it(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    for version in (1, 2, 3):
        put(store, version)
    assert put(store, 2) == next(each for each in store.versions() if each.version.version == 2)
    first = put(store, 1)
    assert first.digest == digest_image(MANIFEST.layout, image(1))
    assert kept(store) == kept(VersionStore(tmp_path)) == ["run/2", "run/3"]
    assert not list(tmp_path.glob(".writing-*"))


def test_a_damaged_newest_version_is_taken_again(tmp_path: Path) -> None:
    put(VersionStore(tmp_path), 1)
    (tmp_path / "run@1.image").write_bytes(bytes(MANIFEST.nbytes))
    store = VersionStore(tmp_path)
    with pytest.raises(VersionNotRetainedError):
        read(store, VersionId("run", 1))
    put(store, 1)
    assert read(store, VersionId("run", 1)) == image(1)


def test_a_version_has_to_grow_and_that_outlives_a_restart(tmp_path: Path) -> None:
    put(VersionStore(tmp_path), 5)
    store = VersionStore(tmp_path)
    with pytest.raises(ManifestError, match="at version 5 already") as refused:
        store.begin(VersionId("run", 4), MANIFEST)
    assert refused.value.code is PublishCode.VERSION_NOT_GROWING
    put(store, 1, run="other")


def test_a_version_does_not_overtake_another_that_ended_meanwhile(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    slow = store.begin(VersionId("run", 1), MANIFEST)
    slow.write(memoryview(image(1)))
    put(store, 2)
    with pytest.raises(ManifestError) as refused:
        slow.seal()
    assert refused.value.code is PublishCode.VERSION_NOT_GROWING
    assert kept(store) == ["run/2"]
    assert not list(tmp_path.glob(".writing-*"))


def test_nothing_is_dropped_after_a_restart_before_it_is_said_how_many_to_keep(tmp_path: Path) -> None:
    before = VersionStore(tmp_path)
    before.set_retained(4)
    for version in (1, 2, 3, 4):
        put(before, version)
    after = VersionStore(tmp_path)
    assert read(after, VersionId("run", 1)) == image(1)
    assert kept(after) == ["run/1", "run/2", "run/3", "run/4"]
    # A trainer goes on while the operator is away.
    for version in (5, 6, 7):
        put(after, version)
    assert kept(after) == ["run/1", "run/2", "run/3", "run/4", "run/6", "run/7"]
    after.pin(VersionId("run", 1))
    after.set_retained(3)
    assert kept(after) == ["run/1", "run/4", "run/6", "run/7"]


@pytest.mark.parametrize("failing", ["json", "digests"])
def test_a_version_that_cannot_be_written_down_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store = VersionStore(tmp_path)
    put(store, 1)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        # A fake: a disk that fails at this very moment.
        if str(target).endswith(failing):
            raise OSError("Input/output error")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            put(store, 2)
    assert kept(store) == kept(VersionStore(tmp_path)) == ["run/1"]
    assert not list(tmp_path.glob("*run@2*")) and not list(tmp_path.glob(".writing-*"))
    put(store, 2, seed=7)
    assert kept(store) == ["run/1", "run/2"]
