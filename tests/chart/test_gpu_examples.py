"""examples/on-gpus at a real API server: no GPU is needed to see what pods come out, and that all of it is taken."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from chart_pods import Object, create
from chart_release import CHART, POLICY_KIND, ROOT, Helm, named

from weightsync_contract import names
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.core.spec import matches, parse_spec

EXAMPLES = ROOT / "examples" / "on-gpus"
FLEETS = ("fleet", "one-gpu")
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
KINDS = ["ConfigMap", "Deployment", "Deployment", "Service", "WeightSync"]


def rendered(cluster: ApiServer, fleet: str) -> list[Object]:
    return list(yaml.safe_load_all(cluster.kubectl("kustomize", str(EXAMPLES / fleet))))


def deployments(objects: list[Object]) -> list[Object]:
    return [each for each in objects if each["kind"] == "Deployment"]


def pod_of(deployment: Object, namespace: str) -> Object:
    template = deployment["spec"]["template"]
    # What the ServiceAccount plugin would set, which doesn't run without a controller-manager.
    spec = {"serviceAccountName": "default"} | template["spec"]
    metadata = template["metadata"] | {"name": "pod-0", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def without_times(pod: Object) -> Object:
    return pod | {
        "metadata": {k: v for k, v in pod["metadata"].items() if k not in ("uid", "creationTimestamp")}
    }


@pytest.mark.parametrize(
    ("fleet", "claim"), [("fleet", "ResourceClaimTemplate"), ("one-gpu", "ResourceClaim")]
)
def test_an_api_server_takes_all_of_it(installed: ApiServer, place: str, fleet: str, claim: str) -> None:
    made = json.loads(
        installed.kubectl(
            *("apply", "--dry-run=server", "--validate=strict", f"--namespace={place}", "--output=json"),
            f"--kustomize={EXAMPLES / fleet}",
        )
    )
    assert sorted(each["kind"] for each in made["items"]) == sorted([*KINDS, claim])
    (weightsync,) = (each for each in made["items"] if each["kind"] == "WeightSync")
    assert weightsync["spec"]["dataPlane"] == {"type": "Sidecar", "staging": "Device"}


@pytest.mark.parametrize("fleet", FLEETS)
def test_agent_and_container_have_one_gpu_one_dev_shm_and_one_user(
    installed: ApiServer, place: str, fleet: str
) -> None:
    found = deployments(rendered(installed, fleet))
    assert [each["metadata"]["name"] for each in found] == ["trainer", "vllm"]
    for each in found:
        spec = create(installed, pod_of(each, place))["spec"]
        pair = (spec["initContainers"][0], spec["containers"][0])
        assert pair[0]["name"] == "weightsync-agent"
        assert [container["resources"]["claims"] for container in pair] == [[{"name": "gpu"}]] * 2
        shm = [[m["name"] for m in c["volumeMounts"] if m["mountPath"] == "/dev/shm"] for c in pair]
        assert shm[0] == shm[1]
        (volume,) = (v for v in spec["volumes"] if [v["name"]] == shm[0])
        assert volume["emptyDir"]["medium"] == "Memory"
        assert all("runAsUser" not in container["securityContext"] for container in pair)
        assert spec["securityContext"]["runAsUser"] == 65532


@pytest.mark.parametrize(
    ("fleet", "claim"),
    [
        ("fleet", {"name": "gpu", "resourceClaimTemplateName": "gpu"}),
        ("one-gpu", {"name": "gpu", "resourceClaimName": "one-gpu"}),
    ],
)
def test_pods_have_a_gpu_each_or_all_have_the_same(installed: ApiServer, fleet: str, claim: Object) -> None:
    objects = rendered(installed, fleet)
    for each in deployments(objects):
        assert each["spec"]["template"]["spec"]["resourceClaims"] == [claim]
    ((kind, name),) = (
        (each["kind"], each["metadata"]["name"]) for each in objects if "Claim" in each["kind"]
    )
    field = "resourceClaimTemplateName" if kind == "ResourceClaimTemplate" else "resourceClaimName"
    assert claim[field] == name


@pytest.mark.parametrize("fleet", FLEETS)
def test_the_component_makes_what_the_policy_makes(
    installed: ApiServer, place: str, tmp_path: Path, fleet: str
) -> None:
    """But for a /dev/shm of the container's own, which the component can't know: there it brings another one."""
    shutil.copytree(ROOT / "examples/on-a-cluster/sidecar", tmp_path / "agent")
    shutil.copytree(EXAMPLES / "sidecar", tmp_path / "claim")
    (tmp_path / "mine").mkdir()
    before = deployments(rendered(installed, fleet))
    for each in before:
        spec = each["spec"]["template"]["spec"]
        spec["volumes"] = [v for v in spec["volumes"] if v["name"] != "shm"]
        mounts = spec["containers"][0]["volumeMounts"]
        mounts[:] = [m for m in mounts if m["name"] != "shm"]
    (tmp_path / "mine/workloads.yaml").write_text(yaml.safe_dump_all(before))
    components = {"resources": ["workloads.yaml"], "components": ["../agent", "../claim"]}
    (tmp_path / "mine/kustomization.yaml").write_text(yaml.safe_dump(components))
    after = list(yaml.safe_load_all(installed.kubectl("kustomize", str(tmp_path / "mine"))))
    by_name = {each["metadata"]["name"]: each for each in after}
    for each in before:
        injected = create(installed, pod_of(each, place))
        patched = create(installed, pod_of(by_name[each["metadata"]["name"]], place))
        assert injected["spec"]["initContainers"][0]["resources"]["claims"] == [{"name": "gpu"}]
        assert without_times(patched) == without_times(injected)


def test_the_weightsync_selects_the_pods() -> None:
    spec = parse_spec(yaml.safe_load((EXAMPLES / "fleet/weightsync.yaml").read_text())["spec"])
    selects = {"trainer": spec.trainer, "inference": spec.inference}
    for file in ("trainer", "vllm"):
        for each in deployments(list(yaml.safe_load_all((EXAMPLES / f"fleet/{file}.yaml").read_text()))):
            labels = each["spec"]["template"]["metadata"]["labels"]
            selected = [role for role, selector in selects.items() if matches(selector, labels)]
            assert selected == [labels[names.LABEL_ROLE]]


def test_the_charts_values_for_one_gpu_reach_the_agents(helm: Helm) -> None:
    objects = helm.template(EXAMPLES / "one-gpu/values.yaml", has=[POLICY_KIND.format(version="v1")])
    policy = named(objects, "MutatingAdmissionPolicy")
    (agent,) = (each for each in policy["spec"]["variables"] if each["name"] == "agent")
    # The policy's template says the type of each value, too.
    bare = re.sub(r"dyn\(|\)|\s", "", agent["expression"])
    assert '{"name":"NCCL_MULTI_RANK_GPU_ENABLE","value":"1"}' in bare


def test_every_image_of_the_project_is_of_this_version() -> None:
    text = "".join(path.read_text() for path in EXAMPLES.rglob("*.yaml"))
    assert set(re.findall(r"image: (\S+)", text)) == {f"weightsync/vllm:{VERSION}"}


def test_the_programs_are_programs(installed: ApiServer) -> None:
    objects = rendered(installed, "fleet")
    sources = [
        *(text for each in objects if each["kind"] == "ConfigMap" for text in each["data"].values()),
        *(d["spec"]["template"]["spec"]["initContainers"][0]["command"][-1] for d in deployments(objects)),
    ]
    assert len(sources) == 3
    for source in sources:
        assert ast.parse(source).body
