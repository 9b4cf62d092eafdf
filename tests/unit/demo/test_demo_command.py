"""The demo's command line, as a new user meets it."""

import json
from pathlib import Path

import pytest

from weightsync_demo import __main__ as command
from weightsync_demo.kube.errors import BuildError


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for word in ("--engine", "--json", "--kubeconfig", "exit status", "examples"):
        assert word in told


@pytest.mark.parametrize("arguments", [["--engine", "none"], ["--context", "c"], ["--nonsense"]])
def test_bad_usage_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2


def test_a_failure_is_one_object_with_the_error_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_go(*_: object) -> None:
        raise BuildError("no Go toolchain: install one")

    monkeypatch.setattr(command, "story", no_go)
    assert command.main(["--json", "--dir", str(tmp_path)]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] is False
    assert "install one" in result["error"]
    assert result["seconds"]["total"] >= 0
