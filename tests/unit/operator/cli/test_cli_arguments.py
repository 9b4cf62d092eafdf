"""The command line: what it takes, refuses, explains and completes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightsync_operator.cli.arguments import make_parser, parse
from weightsync_operator.cli.core.completion import candidates, option_value
from weightsync_operator.cli.core.durations import parse_duration
from weightsync_operator.cli.core.exits import MEANINGS, Exit
from weightsync_operator.cli.core.verbs import Verb
from weightsync_operator.cli.main import _options, complete, main

COMMANDS = _options(make_parser("weightsync"))


def test_options_go_after_the_command_as_with_kubectl() -> None:
    given = parse("weightsync", ["get", "policy", "-w", "--timeout", "2m", "-n", "team", "--context", "c"])
    assert (given.command, given.name, given.watch, given.timeout) == ("get", "policy", True, 120.0)
    assert (given.namespace, given.context, given.kubeconfig) == ("team", "c", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["get", "--watch"], "--watch follows one WeightSync: name it"),
        (["get", "policy", "-A"], "a name is in one namespace"),
        (["status"], "NAME"),
        (["pin", "policy"], "VERSION"),
        (["get", "policy", "--timeout", "soon"], "'soon' is no duration: give 30, 90s, 5m or 1h"),
        (["status", "policy", "-o", "yaml"], "invalid choice"),
    ],
)
def test_what_can_not_be_is_refused_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == Exit.USAGE
    assert said in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"], prog="kubectl weightsync")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "kubectl weightsync get policy --watch" in text
    for command in ("status", "get", "doctor", "completion", *Verb):
        assert re.search(rf"\n    {command}\s", text), command
    for code, meaning in MEANINGS.items():
        assert f"  {code.value:<3}  {meaning}" in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30.0), ("90s", 90.0), ("1m30s", 90.0), ("1h", 3600.0), ("500ms", 0.5), ("0", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5 m", "5x", "-1s", "1m30"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sta"], ["status"]),
        (["re"], ["resume", "retry"]),
        (["status", "p"], ["policy", "pony"]),
        (["status", "-n", "team", "po"], ["policy", "pony"]),
        (["pin", "policy", ""], ["latest"]),
        (["get", "policy", "--wa"], ["--watch"]),
        (["get", "-o", ""], ["json", "text"]),
        (["get", "--kubeconfig", ""], []),
        (["status", "policy", ""], []),
        (["completion", "z"], ["zsh"]),
        (["nonsense", ""], []),
    ],
)
def test_completion(words: list[str], offered: list[str]) -> None:
    assert candidates(words, COMMANDS, lambda: ["policy", "pony"]) == offered


def test_completion_asks_the_cluster_that_the_words_name() -> None:
    words = ["status", "--context=c", "-n", "team", ""]
    assert option_value(words, "--context") == "c"
    assert option_value(words, "-n", "--namespace") == "team"
    assert option_value(words, "--kubeconfig") == ""


def test_completion_without_a_cluster_offers_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert complete(["status", ""]) == []
    assert complete(["stat"]) == ["status"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "weightsync __complete" in capsys.readouterr().out


def test_bash_completes_with_it(tmp_path: Path) -> None:
    tool = tmp_path / "weightsync"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m weightsync_operator.cli.main "$@"\n')
    tool.chmod(0o755)
    script = (
        "source <(weightsync completion bash); COMP_WORDS=(weightsync roll); COMP_CWORD=1; _weightsync; "
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "rollback"
