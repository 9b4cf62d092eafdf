"""The command line, and what it refuses."""

import pytest

from weightsync_operator.settings import parse


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, environ={})
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_without_a_certificate_only_this_machine_can_dial() -> None:
    assert parse([], environ={}).session_host == "127.0.0.1"


def test_with_a_certificate_everybody_can() -> None:
    settings = parse(["--session-cert", "c", "--session-key", "k"], environ={"POD_IP": "10.1.2.3"})
    assert (settings.session_host, settings.advertised_host) == ("0.0.0.0", "10.1.2.3")


def test_as_a_service_everybody_can() -> None:
    settings = parse(["--session-service", "op.system.svc"], environ={"POD_IP": "10.1.2.3"})
    assert (settings.session_host, settings.session_addresses) == ("0.0.0.0", ("10.1.2.3",))
    assert parse(["--session-service", "op"], environ={}).session_addresses == ()


def test_a_certificate_has_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--session-service", "op", "--session-cert", "c", "--session-key", "k")
    assert "give one of the two" in refused(capsys, *both)


@pytest.mark.parametrize("service", ["Op", "a b", "op.ns.svc.cluster.local", "-op", "op:8443"])
def test_a_service_that_is_none(capsys: pytest.CaptureFixture[str], service: str) -> None:
    assert "is no Service" in refused(capsys, f"--session-service={service}")


def test_an_authority_too_short_to_be_rotated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "too short to be rotated" in refused(capsys, "--ca-lifetime", "3600")


def test_tokens_never_go_in_the_clear(capsys: pytest.CaptureFixture[str]) -> None:
    assert "would send tokens in the clear" in refused(capsys, "--session-host", "0.0.0.0")
    assert "go together" in refused(capsys, "--session-cert", "c")


def test_one_namespace_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--namespace", "n"], environ={}).namespace == "n"
    assert parse(["--all-namespaces"], environ={}).namespace == ""
    assert "not allowed with" in refused(capsys, "--namespace", "n", "--all-namespaces")


def test_the_pod_says_who_it_is() -> None:
    settings = parse([], environ={"POD_NAME": "operator-0", "POD_NAMESPACE": "system"})
    assert (settings.identity, settings.lease_namespace) == ("operator-0", "system")


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none(capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert "is no port" in refused(capsys, f"--session-port={port}")


def test_lease_times_that_could_make_two_leaders(capsys: pytest.CaptureFixture[str]) -> None:
    assert "must grow" in refused(capsys, "--lease-renew", "20")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], environ={})
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "KUBECONFIG" in text
