"""An image's root file system, unpacked, and processes in it as a hardened pod would start them."""

import json
import shutil
import subprocess
import tarfile
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
exec setpriv --no-new-privs --inh-caps=-all chroot --userspec="$user:$user" --groups="$user" "$root" "$@"
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
    with tarfile.open(archive) as outer:

        def read(name: str) -> bytes:
            file = outer.extractfile(name)
            assert file is not None, name
            return file.read()

        (entry,) = json.loads(read("manifest.json"))
        sizes = []
        for name in entry["Layers"]:
            member = outer.getmember(name)
            # The same layer twice is one file and a link to it.
            member = outer.getmember(str(Path(name).parent / member.linkname)) if member.issym() else member
            sizes.append(member.size)
            with tarfile.open(fileobj=outer.extractfile(member)) as layer:
                _lay(layer, root)
        return Image(root, json.loads(read(entry["Config"])), tuple(entry["RepoTags"]), tuple(sizes))


def _lay(layer: tarfile.TarFile, root: Path) -> None:
    members = layer.getmembers()
    for member in members:
        path = Path(member.name)
        if path.name == f"{WHITEOUT}{WHITEOUT}.opq":
            _remove(*(root / path.parent).iterdir())
        elif path.name.startswith(WHITEOUT):
            _remove(root / path.parent / path.name.removeprefix(WHITEOUT))
    for member in members:
        if not Path(member.name).name.startswith(WHITEOUT):
            target = root / member.name
            if (target.is_symlink() or target.exists()) and not (target.is_dir() and member.isdir()):
                _remove(target)
            layer.extract(member, root, filter="fully_trusted")


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
