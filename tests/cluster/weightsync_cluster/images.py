"""Container images made of a few files, as OCI archives that `ctr images import` reads."""

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAUSE = "weightsync.test/pause:1"
BUSYBOX = "weightsync.test/busybox:1"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_OCI = "application/vnd.oci.image"


def write(root: Path, directory: Path) -> None:
    """Write the images PAUSE and BUSYBOX, made of the packages unpacked in `root`, into `directory`."""
    directory.mkdir()
    pause = {"bin/catatonit": _executable(root, "catatonit")}
    write_image(directory / "pause.tar", PAUSE, pause, entrypoint=["/bin/catatonit", "-P"])
    busybox = {"bin/busybox": _executable(root, "busybox")}
    files: dict[str, bytes | str] = {
        **busybox,
        "etc/passwd": b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
        **{f"bin/{name}": "busybox" for name in APPLETS},
    }
    write_image(directory / "busybox.tar", BUSYBOX, files, command=["sh"])


# Those that tests call. wget has to be called without -T, by which this version of it falls; `timeout` does.
APPLETS = (
    *("cat", "echo", "env", "grep", "hostname", "httpd", "id", "ip", "kill", "ls", "mkdir", "nc", "nslookup"),
    *("ping", "ps", "rm", "sed", "sh", "sleep", "stat", "test", "timeout", "touch", "true", "wget"),
)


def _executable(root: Path, name: str) -> bytes:
    found = [root / folder / name for folder in ("bin", "usr/bin") if (root / folder / name).is_file()]
    return found[0].read_bytes()


def write_image(
    path: Path,
    name: str,
    files: Mapping[str, bytes | str],
    *,
    entrypoint: Sequence[str] = (),
    command: Sequence[str] = (),
) -> None:
    """Write an image of one layer to `path`.

    `files` gives, for each path in the image, an executable's bytes, or as a string what a symbolic link
    names. The same arguments make the same bytes.
    """
    layer = _layer(files)
    packed = gzip.compress(layer, mtime=0)
    machine = {"architecture": _ARCHITECTURES[platform.machine()], "os": "linux"}
    config = {
        **machine,
        "config": {"Env": [f"PATH={PATH}"], "Entrypoint": list(entrypoint), "Cmd": list(command)},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    config_bytes = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": _described(f"{_OCI}.config.v1+json", config_bytes),
        "layers": [_described(f"{_OCI}.layer.v1.tar+gzip", packed)],
    }
    manifest_bytes = json.dumps(manifest).encode()
    index = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.index.v1+json",
        "manifests": [
            {
                **_described(f"{_OCI}.manifest.v1+json", manifest_bytes),
                "platform": machine,
                "annotations": {"io.containerd.image.name": name},
            }
        ],
    }
    blobs = {f"blobs/sha256/{_sha256(blob)}": blob for blob in (config_bytes, manifest_bytes, packed)}
    whole = {
        "oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
        "index.json": json.dumps(index).encode(),
        **blobs,
    }
    with tarfile.open(path, "w") as archive:
        for member, data in whole.items():
            _add(archive, member, data, 0o644)


def _layer(files: Mapping[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for folder, mode in (("tmp", 0o1777), ("proc", 0o755), ("sys", 0o755), ("dev", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        for name, content in sorted(files.items()):
            _add(archive, name, content, 0o755)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes | str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode = mode
    if isinstance(content, str):
        entry.type, entry.linkname = tarfile.SYMTYPE, content
        archive.addfile(entry)
    else:
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def _described(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


def _digest(data: bytes) -> str:
    return f"sha256:{_sha256(data)}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
