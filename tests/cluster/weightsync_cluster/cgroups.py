"""The control groups that nodes keep their pods in; like the machine's memory, they are not the node's own."""

from contextlib import suppress
from pathlib import Path

from weightsync_demo.waiting import wait_for

ROOT = Path("/sys/fs/cgroup")
# Of version 1: each has a hierarchy of its own.
CONTROLLERS = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids", "systemd")
REMOVE_TIMEOUT_S = 20.0


def hierarchies() -> list[Path]:
    """The folders in which a group has to be made: one with version 2, one a controller with version 1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [ROOT / controller for controller in CONTROLLERS if (ROOT / controller).is_dir()]


def make(name: str) -> None:
    """Make the group `name`, for all that a pod is limited in."""
    for hierarchy in hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        if hierarchy.name == "cpuset":
            # Nothing can be put into a group that has no processor yet.
            for file in ("cpuset.cpus", "cpuset.mems"):
                (group / file).write_text((hierarchy / file).read_text())


def existing(pattern: str) -> list[Path]:
    """Groups whose names fit `pattern`, also in hierarchies that nobody of ours has used."""
    places = {*hierarchies(), ROOT / "unified"}
    return sorted(group for place in places for group in place.glob(pattern))


def remove(pattern: str) -> None:
    """Remove the groups whose names fit `pattern`, once the last process in them has ended."""
    wait_for(lambda: _removed(pattern), REMOVE_TIMEOUT_S, f"the end of what runs in cgroups {pattern}")


def _removed(pattern: str) -> bool:
    for group in existing(pattern):
        for folder in (*sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True), group):
            with suppress(OSError):
                folder.rmdir()
    return not existing(pattern)
