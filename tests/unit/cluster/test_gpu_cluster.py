"""kind with GPUs, by programs that only pretend: what is missing is named, and what is run."""

import json
from pathlib import Path

import pytest
import yaml

from weightsync_cluster import gpus
from weightsync_cluster.gpus import GpuCluster

ROOT = Path(__file__).parents[3]
CONFIGURATION = ROOT / "examples/on-gpus/kind/cluster.yaml"
# Each writes down what it is told, and what it is given to read.
PRETENDED = """#!/bin/sh
echo "$(basename "$0") $*" >> "$TOLD"
case "$*" in *--config=-*) cat > "$TOLD.config";; esac
cat "$TOLD.$(basename "$0")" 2>/dev/null
exit 0
"""
SLICES = {"items": [{"spec": {"driver": "gpu.nvidia.com", "devices": [{"name": "gpu-0"}]}}]}
SAID = {
    "nvidia-smi": "GPU 0: any (UUID: GPU-1)\n",
    "docker": "nvidia\n",
    "kind": "",
    "kubectl": json.dumps(SLICES),
    "helm": "nvidia/nvidia-dra-driver-gpu\t25.12.0\n",
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the programs; `told` beside it is what they were told, `told.NAME` what one answers."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, said in SAID.items():
        (programs / name).write_text(PRETENDED)
        (programs / name).chmod(0o755)
        (tmp_path / f"told.{name}").write_text(said)
    for name in ("sh", "basename", "cat"):
        (programs / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return programs


def test_a_machine_that_has_all_lacks_nothing(machine: Path) -> None:
    assert gpus.missing() == ""


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("nvidia-smi", "no NVIDIA GPU here"),
        ("docker", "no docker daemon that answers, or no kind on PATH"),
        ("kind", "no docker daemon that answers, or no kind on PATH"),
        ("kubectl", "no kubectl on PATH"),
        ("helm", "no helm on PATH"),
    ],
)
def test_a_program_that_is_not_there_is_named(machine: Path, gone: str, reason: str) -> None:
    (machine / gone).unlink()
    assert reason in gpus.missing()


@pytest.mark.parametrize(
    ("program", "said", "reason"),
    [
        ("nvidia-smi", "", "no NVIDIA GPU here"),
        ("docker", "runc\n", "docker gives containers no GPU: install NVIDIA's container toolkit"),
        ("helm", "No results found\n", "helm does not know nvidia/nvidia-dra-driver-gpu"),
    ],
)
def test_a_program_that_answers_otherwise_is_named(
    machine: Path, program: str, said: str, reason: str
) -> None:
    (machine.parent / f"told.{program}").write_text(said)
    assert reason in gpus.missing()


def test_it_is_made_as_the_example_says_and_with_the_driver(machine: Path) -> None:
    told = machine.parent / "told"
    cluster = GpuCluster("g", machine / "kubectl", machine.parent, CONFIGURATION)
    cluster.up()
    assert yaml.safe_load((machine.parent / "told.config").read_text()) == yaml.safe_load(
        CONFIGURATION.read_text()
    )
    kind, helm, kubectl = told.read_text().splitlines()
    assert kind.startswith(f"kind create cluster --name=g --kubeconfig={machine.parent}/kubeconfig")
    assert f"--version={gpus.DRIVER_VERSION} --kubeconfig={machine.parent}/kubeconfig" in helm
    assert "--kube-context=kind-g" in helm
    assert "get resourceslices" in kubectl


def test_the_readme_installs_the_same_driver() -> None:
    readme = (ROOT / "examples/on-gpus/README.md").read_text()
    assert f"{gpus.DRIVER_CHART} --version {gpus.DRIVER_VERSION}" in readme
    assert all(f"--set {value}" in readme for value in gpus.DRIVER_VALUES)
    claims = [path.read_text() for path in (ROOT / "examples/on-gpus").rglob("*.yaml")]
    classes = {
        line.split(":")[1].strip()
        for text in claims
        for line in text.splitlines()
        if "deviceClassName:" in line
    }
    assert classes == {gpus.DEVICE_CLASS}
