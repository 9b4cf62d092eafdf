"""An image's root file system, unpacked, and processes in it as a hardened pod would start them."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

USER: Final = 65532
SECONDS: Final = 120.0
WHITEOUT: Final = ".wh."

# Its own mounts, processes and network; the root read-only, and memory where a pod has an emptyDir. With the
# user id all capabilities go, and none comes back. Arguments: root, what to mount and where, user, program.
_START: Final = """
set -eu
root=$1 site=$2 user=$3; shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero random urandom; do : > "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"; done
mkdir "$root/dev/shm"; mount -t tmpfs tmpfs "$root/dev/shm"
for folder in tmp run/weightsync var/lib/weightsync; do mount -t tmpfs -o mode=1777 tmpfs "$root/$folder"; done
if [ -n "$site" ]; then
    at="$root/${site#*:}"
    mkdir -p "$at"; mount --bind "${site%%:*}" "$at"; mount -o remount,bind,ro "$at"
fi
mount -o remount,bind,ro "$root"
ip link set lo up 2>/dev/null || true
PATH=$PATH:/usr/sbin:/sbin
chroot=$(command -v chroot)
export PATH="${PATH%:/usr/sbin:/sbin}"
exec setpriv --no-new-privs --inh-caps=-all "$chroot" --userspec="$user:$user" --groups="$user" "$root" "$@"
"""


@dataclass(frozen=True)
class Image:
    """What an archive holds, unpacked at ``root``."""

    root: Path
    config: Mapping[str, Any]
    tags: tuple[str, ...]
    layer_bytes: tuple[int, ...]

    @property
    def labels(self) -> Mapping[str, str]:
        return dict(self.config["config"].get("Labels") or {})

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.config["config"].get("Env") or [])

    @property
    def entrypoint(self) -> list[str]:
        return list(self.config["config"].get("Entrypoint") or [])

    def run(
        self,
        *program: str,
        environment: Mapping[str, str] = {},
        site: str = "",
        user: int = USER,
        seconds: float = SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in it, as a pod with a read-only root file system and no capability would.

        ``site``: HOST:FOLDER, mounted read-only. Raises subprocess.TimeoutExpired.
        """
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--uts", "--ipc"]
        return subprocess.run(
            [*unshare, "sh", "-c", _START, "start", str(self.root), site, str(user), *program],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def files(self) -> dict[str, Path]:
        """Every regular file, by its path in the image."""
        return {
            f"/{path.relative_to(self.root)}": path
            for path in self.root.rglob("*")
            if path.is_file() and not path.is_symlink()
        }


def unpack(archive: Path, root: Path) -> Image:
    """Lay the layers of a docker archive one on the other, in ``root``."""
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        folder = Path(scratch)
        _tar("-xf", str(archive), "-C", scratch)
        (entry,) = json.loads((folder / "manifest.json").read_text())
        layers = [folder / name for name in entry["Layers"]]
        for layer in layers:
            _lay(layer, root)
        sizes = tuple(layer.stat().st_size for layer in layers)
        config = json.loads((folder / entry["Config"]).read_text())
    return Image(root, config, tuple(entry["RepoTags"]), sizes)


def _lay(layer: Path, root: Path) -> None:
    for name in _tar("-tf", str(layer)).splitlines():
        path = root / name.rstrip("/")
        if path.name == f"{WHITEOUT}{WHITEOUT}.opq":
            _remove(*path.parent.iterdir())
        elif path.name.startswith(WHITEOUT):
            _remove(path.with_name(path.name.removeprefix(WHITEOUT)))
    # GNU tar takes what is in the way of a file, but no folder that holds something.
    _tar("-xpf", str(layer), "-C", str(root), "--numeric-owner", f"--exclude={WHITEOUT}*")


def _tar(*arguments: str) -> str:
    return subprocess.run(["tar", *arguments], check=True, capture_output=True, text=True).stdout


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
