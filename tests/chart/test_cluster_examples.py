"""examples/on-a-cluster: what a user applies after helm install, and the agent for clusters that inject none."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_pods import container, create, new_pod
from chart_release import CHART, ROOT, Object

from weightsync_contract import names
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.core.spec import matches, parse_spec

EXAMPLES = ROOT / "examples" / "on-a-cluster"
WORKLOADS = ("trainer.yaml", "vllm.yaml")
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]


def documents(*files: str) -> list[Object]:
    return [each for file in files for each in yaml.safe_load_all((EXAMPLES / file).read_text())]


def deployments() -> list[Object]:
    return [each for each in documents(*WORKLOADS) if each["kind"] == "Deployment"]


def with_component(cluster: ApiServer, directory: Path, workloads: list[Object]) -> list[Object]:
    """The workloads as kustomize makes them with the component sidecar/."""
    shutil.copytree(EXAMPLES / "sidecar", directory / "sidecar")
    (directory / "mine").mkdir()
    (directory / "mine/workloads.yaml").write_text(yaml.safe_dump_all(workloads))
    (directory / "mine/kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["workloads.yaml"], "components": ["../sidecar"]})
    )
    made = cluster.kubectl("kustomize", str(directory / "mine"))
    return list(yaml.safe_load_all(made))


def workload(pod: Object, kind: str) -> Object:
    """A workload of one such pod."""
    labels = pod["metadata"]["labels"]
    template = {"metadata": {"labels": labels}, "spec": pod["spec"]}
    return {
        "apiVersion": "batch/v1" if kind == "Job" else "apps/v1",
        "kind": kind,
        "metadata": {"name": "w", "labels": labels},
        "spec": {"template": template},
    }


def pod_of(made: Object, namespace: str) -> Object:
    template = made["spec"]["template"]
    metadata = template["metadata"] | {"name": "engine-0", "namespace": namespace}
    # What the ServiceAccount plugin would set, which doesn't run without a controller-manager.
    spec = {"serviceAccountName": "default"} | template["spec"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def comparable(pod: Object) -> Any:
    for field in ("uid", "creationTimestamp"):
        del pod["metadata"][field]
    return pod


def cases() -> Iterator[Any]:
    for role, name in (("trainer", "trainer"), ("inference", "vllm")):
        yield pytest.param(new_pod("", container(name), role=role), id=f"bare-{role}")
        own = container(
            name,
            env=[{"name": "A", "value": "$(WEIGHTSYNC_DIR)"}],
            volumeMounts=[{"name": "model", "mountPath": "/model"}],
        )
        more = {
            "initContainers": [container("download"), container("tune")],
            "volumes": [{"name": "model", "emptyDir": {}}, {"name": "cache", "emptyDir": {}}],
        }
        yield pytest.param(new_pod("", own, container("logs"), role=role, **more), id=f"own-things-{role}")


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "Job"])
@pytest.mark.parametrize("pod", list(cases()))
def test_the_component_makes_the_very_pod_that_the_policy_makes(
    installed: ApiServer, place: str, tmp_path: Path, pod: Object, kind: str
) -> None:
    pod["metadata"]["namespace"] = place
    injected = create(installed, pod)
    (made,) = with_component(installed, tmp_path, [workload(pod, kind)])
    patched = pod_of(made, place)
    # The policy leaves it alone, as it has its agent.
    assert patched["spec"]["initContainers"][0]["name"] == "weightsync-agent"
    assert comparable(create(installed, patched)) == comparable(injected)


def test_the_examples_come_up_with_an_agent_either_way(
    installed: ApiServer, place: str, tmp_path: Path
) -> None:
    before = deployments()
    after = with_component(installed, tmp_path, before)
    assert len(before) == len(after) == 2
    by_name = {each["metadata"]["name"]: each for each in after}
    for each in before:
        injected = create(installed, pod_of(each, place))
        patched = create(installed, pod_of(by_name[each["metadata"]["name"]], place))
        assert "weightsync-agent" in [c["name"] for c in injected["spec"]["initContainers"]]
        assert comparable(patched) == comparable(injected)


def test_an_api_server_takes_the_examples(installed: ApiServer, place: str) -> None:
    made = json.loads(
        installed.kubectl(
            *("apply", "--dry-run=server", "--validate=strict", f"--namespace={place}", "--output=json"),
            # As the README says it: the whole folder.
            f"--filename={EXAMPLES}/",
        )
    )
    kinds = sorted(each["kind"] for each in made["items"])
    assert kinds == ["ConfigMap", "Deployment", "Deployment", "Service", "WeightSync"]


def test_the_weightsync_selects_the_examples_pods_and_asks_for_nothing_that_is_not_there() -> None:
    (weightsync,) = documents("weightsync.yaml")
    spec = parse_spec(weightsync["spec"])
    assert spec.unsupported == ()
    selects = {"trainer": spec.trainer, "inference": spec.inference}
    for each in deployments():
        labels = each["spec"]["template"]["metadata"]["labels"]
        selected = [role for role, selector in selects.items() if matches(selector, labels)]
        assert selected == [labels[names.LABEL_ROLE]]


def test_every_image_of_the_project_is_of_this_version() -> None:
    text = "".join(path.read_text() for path in EXAMPLES.rglob("*.yaml"))
    found = set(re.findall(r"image: (\S+)", text))
    assert found == {f"weightsync/agent:{VERSION}", f"weightsync/vllm:{VERSION}"}


def test_vllm_has_the_settings_that_the_agent_needs() -> None:
    (engine,) = (
        d["spec"]["template"]["spec"]["containers"][0]
        for d in deployments()
        if d["metadata"]["name"] == "vllm"
    )
    assert {
        "--middleware=weightsync_engine.guard.Guard",
        '--weight-transfer-config={"backend":"weightsync"}',
    } <= set(engine["args"])
    assert {"name": "VLLM_SERVER_DEV_MODE", "value": "1"} in engine["env"]


def test_the_programs_in_the_examples_are_programs_and_import_what_there_is() -> None:
    sources = [
        *(text for d in documents(*WORKLOADS) if d["kind"] == "ConfigMap" for text in d["data"].values()),
        *(d["spec"]["template"]["spec"]["initContainers"][0]["command"][-1] for d in deployments()),
    ]
    assert len(sources) == 3
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("weightsync"):
                module = ROOT / "engine/src" / str(node.module).replace(".", "/")
                text = module.with_suffix(".py").read_text()
                assert all(re.search(rf"\b{alias.name}\b", text) for alias in node.names)
