"""The agent's command line and its environment."""

import pytest

from weightsync_contract.reasons import Role
from weightsync_engine.agent.config import parse

ENVIRONMENT = {
    "WEIGHTSYNC_ROLE": "inference",
    "WEIGHTSYNC_OPERATOR": "wss://weightsync-operator:8443",
    "WEIGHTSYNC_TOKEN_FILE": "/var/run/secrets/weightsync/token",
    "POD_NAMESPACE": "default",
    "POD_NAME": "vllm-0",
    "POD_UID": "uid",
    "POD_IP": "10.0.0.5",
}


def test_everything_may_come_from_the_environment():
    config = parse([], ENVIRONMENT)
    assert config.role is Role.INFERENCE
    assert (config.pod.namespace, config.pod.name, config.pod.uid) == ("default", "vllm-0", "uid")
    assert str(config.directory) == "/run/weightsync"
    assert str(config.state_directory) == "/var/lib/weightsync"
    assert config.engine_url == "http://127.0.0.1:8000"
    assert (config.limit_rate, config.health_port, config.operator_ca) == (0, None, None)


def test_flags_win():
    config = parse(["--pod-name", "other", "--health-port", "8081", "--limit-rate", "20MiB"], ENVIRONMENT)
    assert (config.pod.name, config.health_port, config.limit_rate) == ("other", 8081, 20 << 20)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("500000", 500_000), ("1.5GiB", 3 << 29), ("20 MB", 20_000_000), ("0", 0), ("4kib", 4096)],
)
def test_rates(text, rate):
    assert parse(["--limit-rate", text], ENVIRONMENT).limit_rate == rate


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit-rate", "fast"], "'fast' is no rate: give bytes a second, as 20MiB"),
        (["--limit-rate", "-3"], "'-3' is no rate"),
        (["--health-port", "70000"], "'70000' is no port"),
        (["--operator", "operator:8443"], "is no ws://HOST:PORT"),
        (["--role", "router"], "invalid choice: 'router'"),
    ],
)
def test_what_is_wrong_is_named(capsys, arguments, says):
    with pytest.raises(SystemExit) as exit_:
        parse(arguments, ENVIRONMENT)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_a_wrong_environment_is_named(capsys):
    with pytest.raises(SystemExit):
        parse([], {**ENVIRONMENT, "WEIGHTSYNC_LIMIT_RATE": "fast"})
    assert "'fast' is no rate" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys):
    with pytest.raises(SystemExit):
        parse([], {name: value for name, value in ENVIRONMENT.items() if name != "POD_UID"})
    assert "--pod-uid" in capsys.readouterr().err


def test_help_names_each_variable(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], {})
    text = capsys.readouterr().out
    for name in (*ENVIRONMENT, "WEIGHTSYNC_DIR", "WEIGHTSYNC_STATE_DIR", "WEIGHTSYNC_ENGINE_URL"):
        assert name in text
