"""Nothing of a cluster stays on the machine, also after a crash."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightsync_cluster import cgroups, node
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.place import Place
from weightsync_cluster.shell import run
from weightsync_cluster.slots import own_place
from weightsync_demo.kube.build import Binaries
from weightsync_demo.waiting import wait_for

PREFIX = "remains"
ROOT = Path(__file__).parents[2]


class Watched:
    """A cluster of its own, and what it could leave behind."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.before = self._machine()

    def run(self, verb: str) -> str:
        """What `python -m weightsync_cluster` says, once it has ended well."""
        done = subprocess.run(
            self.command(verb), env=self.environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "weightsync_cluster", verb, "--name", self.place.name]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "cluster")}

    def assert_nothing_is_left(self) -> None:
        wait_for(lambda: not self.remains(), 10, f"nothing to be left, but there is {self.remains()}")
        assert self._machine() == self.before

    def remains(self) -> list[str]:
        """This cluster's files, control groups, and processes with their mounts."""
        groups, folder = self.place.group("*"), self.place.directory
        found = [str(path) for path in (*cgroups.existing(groups), folder) if path.exists()]
        for process in Path("/proc").glob("[0-9]*"):
            for file in ("cmdline", "cgroup", "mountinfo"):
                try:
                    text = (process / file).read_text(errors="replace")
                except OSError:
                    continue
                if f"{folder}/" in text or self.place.group("") in text:
                    found.append(f"{process.name}/{file}: {text[:200]!r}")
        return found

    def _machine(self) -> dict[str, object]:
        """What all of the machine shares."""
        settings = {
            name: Path("/proc/sys", name).read_text()
            for name in (*node.KERNEL_SETTINGS, "net/ipv4/ip_forward")
        }
        return {"links": sorted(path.name for path in Path("/sys/class/net").iterdir()), **settings}


@pytest.fixture
def watched(own_cluster: Cluster) -> Iterator[Watched]:
    """Beside the cluster of the other tests, which shows that this machine can hold one."""
    with own_place(PREFIX) as place:
        made = Watched(place)
        yield made
        with place.alone(print):
            place.clear()


def test_down_leaves_nothing_and_the_other_cluster_alone(watched: Watched, own_cluster: Cluster) -> None:
    said = watched.run("up")
    assert f"export KUBECONFIG={watched.place.directory}/kubeconfig" in said
    assert watched.remains()
    watched.run("down")
    watched.assert_nothing_is_left()
    watched.run("down")
    assert own_cluster.is_up
    assert all(own_cluster.node_ready(name) for name in own_cluster.nodes)


@pytest.mark.parametrize("reached", ["control", "node2"])
def test_down_removes_what_a_killed_up_has_left(watched: Watched, reached: str) -> None:
    up = subprocess.Popen(watched.command("up"), env=watched.environment, stdout=subprocess.DEVNULL)
    record = watched.place.directory / reached / "process.json"
    try:
        wait_for(record.exists, 60, f"{reached} to be started", interval=0.001)
    finally:
        up.send_signal(signal.SIGKILL)
        up.wait(10)
    watched.run("down")
    watched.assert_nothing_is_left()


def test_up_replaces_what_has_lost_a_machine(watched: Watched, binaries: Binaries) -> None:
    watched.run("up")
    watched.place.machine("control").kill()
    watched.run("up")
    again = Cluster(watched.place.name, binaries, print)
    assert all(again.node_ready(name) for name in again.nodes)
    watched.run("down")
    watched.assert_nothing_is_left()


def test_a_test_run_takes_a_place_of_its_own_and_clears_those_of_the_dead(own_cluster: Cluster) -> None:
    with own_place(PREFIX) as one, own_place(PREFIX) as other:
        assert one.name != other.name
        assert one.name != own_cluster.name
    # The process that held the first is as good as gone, and this is what it has left.
    one.directory.mkdir()
    other.directory.mkdir()
    with own_place(PREFIX) as again:
        assert again.name == one.name
        assert not one.directory.exists()
        assert not other.directory.exists()


def test_what_is_mounted_in_a_clusters_folder_is_not_removed_with_it(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with own_place(PREFIX) as place, place.alone(print):
        mounted = place.directory / "node1" / "volume"
        mounted.mkdir(parents=True)
        run(["mount", "--bind", str(tmp_path), str(mounted)])
        try:
            with pytest.raises(ClusterError, match=f"unmount {mounted}"):
                place.clear()
        finally:
            run(["umount", str(mounted)])
        assert (tmp_path / "kept").exists()
        place.clear()
        assert not place.directory.exists()


def test_a_machine_ends_with_whoever_was_about_to_start_it() -> None:
    script = """
import os, sys
from weightsync_cluster.machine import Spec
from weightsync_cluster.place import Place
machine = Place(sys.argv[1]).machine("node1")
machine.start(Spec([]))
print(machine.running_pid, flush=True)
os.kill(os.getpid(), 9)
"""
    with own_place(PREFIX) as place, place.alone(print):
        command = [sys.executable, "-c", script, place.name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "cluster")}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False, timeout=60)
        assert int(done.stdout) > 0
        wait_for(lambda: place.machine("node1").pid is None, 10, "the machine to end by itself")
        place.clear()
