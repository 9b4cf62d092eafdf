"""What the tools run with, and what a person reads when they fail."""

import sys

import pytest

import env_steps


def test_settings_of_an_outer_environment_are_dropped() -> None:
    env = env_steps.environment({"VIRTUAL_ENV": "/other", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/home/me"})
    assert env == {"HOME": "/home/me", "UV_PYTHON_DOWNLOADS": "never"}


def test_uv_hears_what_was_told_to_pip() -> None:
    env = env_steps.environment({"PIP_INDEX_URL": "pip's", "PIP_CERT": "/pip.pem"})
    assert (env["UV_DEFAULT_INDEX"], env["SSL_CERT_FILE"]) == ("pip's", "/pip.pem")


def test_what_was_told_to_uv_itself_holds() -> None:
    env = env_steps.environment({"PIP_INDEX_URL": "pip's", "UV_DEFAULT_INDEX": "uv's"})
    assert env["UV_DEFAULT_INDEX"] == "uv's"


def test_a_failed_command_shows_its_end_and_the_advice() -> None:
    with pytest.raises(env_steps.SetupError, match=r"(?s)it broke.*Mend it\."):
        env_steps.run([sys.executable, "-c", "print('it broke'); raise SystemExit(1)"], "Mend it.")


def test_addresses_and_passwords_in_them_are_not_shown() -> None:
    shown = env_steps.without_addresses(
        "Failed to fetch: `https://me:secret@index.example/simple/torch/` (404)"
    )
    assert shown == "Failed to fetch: `<address>` (404)"


def test_a_step_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    with env_steps.step("uv"):
        assert capsys.readouterr().out == "  uv "
    assert capsys.readouterr().out == " 0.0 s\n"


def test_a_failed_step_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), env_steps.step("uv"):
        raise ValueError("no")
    assert capsys.readouterr().out == "  uv  failed after 0.0 s\n"
