"""When the environment counts as made. Making it is what every run of the tests begins with."""

import shutil
from pathlib import Path

import pytest

import setup_env
from setup_env import Setup

ROOT = Path(__file__).parents[3]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    for folder in ("requirements", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("contract", "engine"):
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "pyproject.toml").write_text(f"[project]\nname = '{name}'\n")
    made = Setup(tmp_path, tmp_path / ".venv")
    made.python.parent.mkdir(parents=True)
    made.python.touch()
    return made


def test_nothing_is_made_without_a_stamp(setup: Setup) -> None:
    assert not setup.is_made(vllm=True)


def test_a_stamp_says_that_all_is_there(setup: Setup) -> None:
    setup.write_stamp(setup.wanted(vllm=True))
    assert setup.is_made(vllm=True)


def test_an_environment_with_vllm_serves_one_who_wants_none_but_not_the_reverse(setup: Setup) -> None:
    setup.write_stamp(setup.wanted(vllm=True))
    assert setup.is_made(vllm=False)
    setup.write_stamp(setup.wanted(vllm=False))
    assert setup.is_made(vllm=False)
    assert not setup.is_made(vllm=True)


@pytest.mark.parametrize("changed", ["requirements/uv.txt", "requirements/vllm.txt", "scripts/cuda_stubs.py"])
def test_a_changed_lock_or_stub_makes_the_packages_anew(setup: Setup, changed: str) -> None:
    before = setup.wanted(vllm=True)
    setup.write_stamp(before)
    with (setup.root / changed).open("a") as file:
        file.write("# changed\n")
    assert setup.wanted(vllm=True).packages != before.packages
    assert not setup.is_made(vllm=True)


def test_a_changed_member_installs_no_package_anew(setup: Setup) -> None:
    before = setup.wanted(vllm=True)
    (setup.root / "engine/pyproject.toml").write_text("[project]\nname = 'other'\n")
    after = setup.wanted(vllm=True)
    assert (after.packages == before.packages, after.members == before.members) == (True, False)


def test_another_python_makes_it_anew(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.write_stamp(setup.wanted(vllm=True))
    monkeypatch.setattr("sys.version_info", (3, 14, 0, "final", 0))
    assert not setup.is_made(vllm=True)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"packages": "x"}'])
def test_a_broken_stamp_is_none(setup: Setup, content: str) -> None:
    (setup.venv / setup_env.STAMP).write_text(content)
    assert setup.found() is None


def test_a_vanished_interpreter_makes_it_anew(setup: Setup) -> None:
    setup.write_stamp(setup.wanted(vllm=True))
    setup.python.unlink()
    assert not setup.is_made(vllm=True)


def test_a_member_without_sources_is_left_out(setup: Setup) -> None:
    (setup.root / "engine/src").rmdir()
    assert setup.members() == ["contract"]


def test_a_refusal_is_an_exit_code_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.version_info", (3, 9, 0, "final", 0))
    assert setup_env.main([]) == 1
    assert "PYTHON=" in capsys.readouterr().err
