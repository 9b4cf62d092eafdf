"""Files that let their reader in."""

import os
from pathlib import Path

import yaml


def write_private(path: Path, text: str) -> None:
    """Write `path` for its owner only, whole or not at all: a reader never sees half of it."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def write_kubeconfig(path: Path, url: str, ca_file: Path, token: str, name: str = "weightsync") -> None:
    """Write a kubeconfig with one context, `name`, in the namespace default, for the bearer of `token`."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": url, "certificate-authority": str(ca_file)}}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
    }
    write_private(path, yaml.safe_dump(config, sort_keys=False))
