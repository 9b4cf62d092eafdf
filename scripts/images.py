"""Build the images of the Dockerfile with docker, podman or buildah, whichever is there.

pip's configuration and the machine's certificates reach the build as secrets: they decide where packages come
from, and stay out of the images.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("operator", "agent", "vllm")
TOOLS = ("docker", "podman", "buildah")
# What of pip's configuration says where packages come from, and how to reach it.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "proxy",
    "timeout",
    "default-timeout",
    "trusted-host",
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
SECRET_CA = "/run/secrets/ca"
BUNDLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def project_version(root: Path = ROOT) -> str:
    """The version that all members share."""
    return str(tomllib.loads((root / "operator" / "pyproject.toml").read_text())["project"]["version"])


def image_name(target: str, version: str) -> str:
    return f"weightsync/{target}:{version}"


def pip_configuration(listed: str, *, certificates: bool) -> str:
    """pip.conf for the build, from what `pip config list` prints; later lines win, as they do for pip."""
    found = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        text = str(ast.literal_eval(value)) if value.startswith(("'", '"')) else value
        # A folder of this machine is no place that a build sees.
        if key in PIP_SETTINGS and not (key == "find-links" and "://" not in text):
            found[key] = text
    if certificates:
        found["cert"] = SECRET_CA
    return "".join(f"{line}\n" for line in ("[global]", *(f"{k} = {_lines(v)}" for k, v in found.items())))


def _lines(value: str) -> str:
    """Several addresses are one a line, all but the first indented."""
    return "\n    ".join(value.split("\n"))


def certificates(environment: Mapping[str, str], listed: str) -> Path | None:
    """The bundle that pip trusts here, if it is another one than its own."""
    named = [environment.get(name, "") for name in BUNDLES]
    named += re.findall(r"(?m)^\S*\.cert='(.+)'$", listed)
    return next((Path(name) for name in named if name and Path(name).is_file()), None)


@dataclass(frozen=True)
class Secrets:
    """Files that the build's pip reads, by the name of the secret."""

    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def collect(cls, folder: Path, environment: Mapping[str, str] = os.environ) -> Secrets:
        """Write into `folder` what this machine tells its own pip."""
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
        )
        listed = done.stdout if done.returncode == 0 else ""
        bundle = certificates(environment, listed)
        settings = folder / "pip.conf"
        settings.touch(mode=0o600)
        settings.write_text(pip_configuration(listed, certificates=bundle is not None))
        return cls({"pip": settings} | ({"ca": bundle} if bundle else {}))

    def options(self) -> list[str]:
        return [part for name, path in self.files.items() for part in ("--secret", f"id={name},src={path}")]


@dataclass(frozen=True)
class Build:
    """One image to build."""

    target: str
    arguments: Mapping[str, str]
    name: str

    def command(self, tool: Sequence[str], secrets: Secrets, root: Path = ROOT) -> list[str]:
        given = [part for key, value in self.arguments.items() for part in ("--build-arg", f"{key}={value}")]
        return [
            *tool,
            "build",
            "--target",
            self.target,
            "--tag",
            self.name,
            *given,
            *_proxies(os.environ),
            *secrets.options(),
            str(root),
        ]


def _proxies(environment: Mapping[str, str]) -> list[str]:
    """Named without their values, which may hold passwords: the tool reads them itself."""
    names = [name for pair in PROXIES for name in (pair, pair.lower()) if environment.get(name)]
    return [part for name in names for part in ("--build-arg", name)]


def revision(root: Path = ROOT) -> str:
    """The commit that is checked out; `unknown` outside of git, marked where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def find_tool() -> str | None:
    return next((tool for tool in TOOLS if shutil.which(tool)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: operator agent"
    )
    parser.add_argument(
        "--tool", default=find_tool(), help=f"default: the first there is of {', '.join(TOOLS)}"
    )
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="of the Dockerfile"
    )
    options = parser.parse_args(arguments)
    if unknown := [target for target in options.targets if target not in TARGETS]:
        parser.error(f"{unknown[0]} is no target: give of {', '.join(TARGETS)}")
    if wrong := [pair for pair in options.build_arg if "=" not in pair]:
        parser.error(f"--build-arg {wrong[0]} is no NAME=VALUE")
    if options.tool is None or shutil.which(options.tool) is None:
        parser.error(
            f"no {options.tool or ' and no '.join(TOOLS)} is here: install one, or name one by --tool"
        )
    version = project_version()
    given = {"VERSION": version, "REVISION": revision()} | dict(p.split("=", 1) for p in options.build_arg)
    with tempfile.TemporaryDirectory() as folder:
        secrets = Secrets.collect(Path(folder))
        for target in options.targets or ("operator", "agent"):
            build = Build(target, given, image_name(target, version))
            print(f"images: {build.name}", flush=True)
            # BuildKit is what knows secrets; older dockers have it, but not by default.
            environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
            done = subprocess.run(build.command([options.tool], secrets), check=False, env=environment)
            if done.returncode != 0:
                print(f"images: {build.name} was not built; see above", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
