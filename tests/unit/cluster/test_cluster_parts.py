"""What the test cluster is made of, as far as it needs no root and no process."""

import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from weightsync_cluster import addresses, control, kind, network, node
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.images import write_image
from weightsync_cluster.pki import Authority, write_kubeconfig
from weightsync_cluster.place import SHADOWED, Place
from weightsync_cluster.shell import run


def test_a_cut_drops_both_directions_where_packets_arrive() -> None:
    text = network.rules([(frozenset({"10.244.1.2"}), frozenset({"10.244.2.0/24", "10.99.0.12"}))])
    assert text.count("ip saddr { 10.244.1.2/32 } ip daddr { 10.244.2.0/24, 10.99.0.12/32 } drop") == 2
    assert text.count("ip saddr { 10.244.2.0/24, 10.99.0.12/32 } ip daddr { 10.244.1.2/32 } drop") == 2
    assert set(re.findall(r"hook (\w+)", text)) == {"forward", "input"}
    assert "drop" not in network.rules([])


def test_a_side_of_a_cut_is_made_of_addresses() -> None:
    with pytest.raises(ValueError, match="web-0"):
        network.rules([(frozenset({"web-0"}), frozenset({"10.244.1.2"}))])


@pytest.mark.parametrize("name", ["", "../x", "A", "a.b", "x" * 21])
def test_a_name_that_would_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="name"):
        Place(name)


def test_a_cluster_never_takes_the_control_groups_of_another_for_its_own() -> None:
    pattern = re.compile(re.escape(Place("a").group("*")).replace(r"\*", ".*"))
    assert pattern.fullmatch(Place("a").group("node1"))
    assert not pattern.fullmatch(Place("a-b").group("node1"))
    assert not pattern.fullmatch(Place("ab").group("node1"))


@pytest.mark.parametrize("shadowed", SHADOWED)
def test_a_disk_where_nodes_have_one_of_their_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, shadowed: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{shadowed}/cache")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    with pytest.raises(ClusterError, match="XDG_CACHE_HOME"), Place("x").alone(print):
        pass


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="root"), Place("x").alone(print):
        pass


def test_an_image_is_the_same_bytes_each_time_and_what_it_says(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_image(
            tmp_path / name, "example.test/x:1", {"bin/a": b"\x7fELF", "bin/b": "a"}, command=["/bin/b"]
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(tmp_path / "one") as archive:

        def blob(digest: str) -> bytes:
            member = archive.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert member is not None
            return member.read()

        index = archive.extractfile("index.json")
        assert index is not None
        described = json.load(index)["manifests"][0]
        assert described["annotations"] == {"io.containerd.image.name": "example.test/x:1"}
        manifest = json.loads(blob(described["digest"]))
        assert json.loads(blob(manifest["config"]["digest"]))["config"]["Cmd"] == ["/bin/b"]
        assert len(blob(manifest["layers"][0]["digest"])) == manifest["layers"][0]["size"]


def test_certificates_are_for_one_purpose_and_one_place(tmp_path: Path) -> None:
    authority = Authority("test")
    control.write_credentials(tmp_path, authority)
    server = x509.load_pem_x509_certificate((tmp_path / "apiserver.crt").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = {str(name.value) for name in names}
    assert {"127.0.0.1", addresses.CONTROL_ADDRESS, addresses.API_SERVICE_ADDRESS} <= found
    assert "kubernetes.default.svc" in found
    own = x509.load_pem_x509_certificate(authority.own.certificate.encode())
    server.verify_directly_issued_by(own)
    purposes = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [purpose.dotted_string for purpose in purposes] == ["1.3.6.1.5.5.7.3.1"]
    for secret in ("ca.key", "accounts.key", "controllers.kubeconfig"):
        assert (tmp_path / secret).stat().st_mode & 0o077 == 0, secret


def test_a_kubeconfig_needs_no_other_file(tmp_path: Path) -> None:
    authority = Authority("test")
    write_kubeconfig(tmp_path / "k", "https://127.0.0.1:1", authority, authority.issue("me"), "here")
    found = yaml.safe_load((tmp_path / "k").read_text())
    assert found["current-context"] == "here"
    assert "certificate-authority-data" in found["clusters"][0]["cluster"]
    assert set(found["users"][0]["user"]) == {"client-certificate-data", "client-key-data"}


def test_a_node_is_heard_often_enough_to_be_kept() -> None:
    # It renews after a quarter of the lease; three may get lost on a busy machine.
    assert control.NODE_GRACE_S > 3 * node.LEASE_S / 4


def test_a_command_that_fails_says_what_it_wrote() -> None:
    with pytest.raises(ClusterError, match="abc"):
        run(["sh", "-c", "echo ab''c >&2; exit 1"])
    with pytest.raises(ClusterError, match=r"no end after 0\.1 s"):
        run(["sleep", "5"], timeout=0.1)
    with pytest.raises(ClusterError, match="not-there is not on this machine"):
        run(["not-there"])


# kind, by a program that only pretends: it writes down what it is told.

PRETENDED = '#!/bin/sh\necho "$(basename "$0") $*" >> "$TOLD"\n[ "$1" != info ] || exit "$DOCKER_STATUS"\n'


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("kind", "docker"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(PRETENDED)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("DOCKER_STATUS", "0")
    return tmp_path / "told"


def test_kind_is_used_where_a_daemon_answers(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind.available()
    monkeypatch.setenv("DOCKER_STATUS", "1")
    assert not kind.available()
    (told.parent / "bin" / "kind").unlink()
    monkeypatch.setenv("DOCKER_STATUS", "0")
    assert not kind.available()


def test_kind_never_writes_the_users_kubeconfig(told: Path, tmp_path: Path) -> None:
    cluster = kind.KindCluster("weightsync-e2e", Path("kubectl"), tmp_path)
    cluster.up()
    cluster.load_image(Path("x.tar"))
    cluster.kill_node("weightsync-e2e-worker")
    cluster.down()
    lines = told.read_text().splitlines()
    own = f"--kubeconfig={tmp_path}/kubeconfig"
    assert all(own in line for line in lines if " cluster " in line)
    assert [line.split(" --")[0] for line in lines] == [
        "kind create cluster",
        "kind load image-archive x.tar",
        "docker kill weightsync-e2e-worker",
        "kind delete cluster",
    ]
