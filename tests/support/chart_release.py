"""The chart as helm renders and installs it."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "weightsync"
NAMESPACE = "weightsync-system"
RELEASE = "weightsync"
POLICY_KIND = "admissionregistration.k8s.io/{version}/MutatingAdmissionPolicy"
REFUSAL_KIND = "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"

Object = dict[str, Any]


class HelmError(Exception):
    """helm failed; what it said."""


class Helm:
    """helm with nothing of the user's own settings: a home of its own, and no cluster unless one is named."""

    def __init__(self, executable: Path, home: Path, kubeconfig: Path | None = None) -> None:
        self.executable = executable
        self._home = home
        self._kubeconfig = kubeconfig

    def on(self, kubeconfig: Path) -> "Helm":
        """The same, talking to that cluster."""
        return Helm(self.executable, self._home, kubeconfig)

    def run(self, *arguments: str, timeout: float = 120.0) -> str:
        """What helm prints on standard output; HelmError with what it says otherwise."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HELM_", "KUBE"))}
        env |= {f"HELM_{kind}_HOME": str(self._home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        env["KUBECONFIG"] = str(self._kubeconfig or "/dev/null")
        done = subprocess.run(
            [str(self.executable), *arguments],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if done.returncode != 0:
            raise HelmError(done.stderr)
        return done.stdout

    def template(
        self,
        *files: Path,
        has: Sequence[str] = (),
        show: str = "",
        namespace: str = NAMESPACE,
        **values: Any,
    ) -> list[Object]:
        """The rendered objects. ``has``: kinds of the cluster as group/version/Kind; ``values`` by top-level name."""
        rendered = self.run(
            *("template", RELEASE, str(CHART), f"--namespace={namespace}"),
            *(f"--values={path}" for path in files),
            *(f"--api-versions={kind}" for kind in has),
            *((f"--show-only={show}",) if show else ()),
            *as_arguments(values),
        )
        return [each for each in yaml.safe_load_all(rendered) if each]

    def install(self, namespace: str, **values: Any) -> str:
        """Install or upgrade the release in ``namespace``; the notes. Waits for nothing: see the caller's cluster."""
        return self.run(
            *("upgrade", "--install", RELEASE, str(CHART), f"--namespace={namespace}", "--create-namespace"),
            *as_arguments(values),
        )


def as_arguments(values: dict[str, Any]) -> list[str]:
    """``--set-json`` for each value."""
    return [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]


def named(objects: Sequence[Object], kind: str, name: str = "") -> Object:
    """The one object of that kind (and name)."""
    (found,) = (each for each in objects if each["kind"] == kind and name in ("", each["metadata"]["name"]))
    return found
