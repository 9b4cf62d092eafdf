import json
import os

import pytest

from weightsync_contract.messages import VersionId
from weightsync_engine.permit import Mode, Permit, parse_permit, read_permit, write_permit

SERVING = Permit("boot-1", Mode.SERVE, VersionId("run-a", 7))
INITIAL = Permit("boot-1", Mode.HOLD, None)


@pytest.mark.parametrize("permit", [SERVING, INITIAL])
def test_what_is_written_is_read(tmp_path, permit):
    write_permit(tmp_path / "permit", permit)
    assert read_permit(tmp_path / "permit") == permit


def test_none_takes_it_away_and_may_be_said_twice(tmp_path):
    path = tmp_path / "permit"
    write_permit(path, SERVING)
    write_permit(path, None)
    write_permit(path, None)
    assert read_permit(path) is None
    assert list(tmp_path.iterdir()) == []


def test_it_is_replaced_whole(tmp_path):
    path = tmp_path / "permit"
    write_permit(path, SERVING)
    with path.open("rb") as before:
        write_permit(path, INITIAL)
        assert parse_permit(before.read()) == SERVING
    assert read_permit(path) == INITIAL
    assert [entry.name for entry in tmp_path.iterdir()] == ["permit"]


def test_another_user_can_read_it_and_only_the_owner_write(tmp_path):
    write_permit(tmp_path / "permit", SERVING)
    assert (tmp_path / "permit").stat().st_mode & 0o777 == 0o644


GOOD = {"boot": "b", "mode": "Serve", "run": "r", "version": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 5000,
        json.dumps(GOOD).encode()[:-1],
        json.dumps(GOOD).encode() + b" " * 5000,
        *(
            json.dumps({**GOOD, **change}).encode()
            for change in (
                {"boot": ""},
                {"boot": 1},
                {"boot": None},
                {"mode": "serve"},
                {"mode": ""},
                {"mode": ["Serve"]},
                {"run": ""},
                {"run": None},
                {"run": 3},
                {"version": None},
                {"version": "1"},
                {"version": True},
                {"version": 1.0},
                {"version": -1},
            )
        ),
        *(json.dumps({k: v for k, v in GOOD.items() if k != gone}).encode() for gone in GOOD),
    ],
)
def test_what_is_no_permit_counts_as_none(tmp_path, data):
    assert parse_permit(json.dumps(GOOD).encode()) is not None
    (tmp_path / "permit").write_bytes(data)
    assert read_permit(tmp_path / "permit") is None


def test_a_directory_is_no_permit(tmp_path):
    assert read_permit(tmp_path) is None


def test_a_write_that_fails_leaves_the_old_permit_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "permit"
    write_permit(path, SERVING)

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_permit(path, INITIAL)
    assert read_permit(path) == SERVING
    assert [entry.name for entry in tmp_path.iterdir()] == ["permit"]
