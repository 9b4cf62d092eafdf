"""The CRD at a real API server, with the documents that users would write."""

import copy
import json
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from weightsync_contract.codec import camel
from weightsync_contract.names import API_VERSION, GROUP, KIND, PLURAL
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_demo.kube.errors import KubectlError
from weightsync_operator.core.model import ConditionStatus, CurrentVersion, GroupStatus, MemberCounts, Status
from weightsync_operator.core.spec import parse_spec
from weightsync_operator.documents import status_document

ROOT = Path(__file__).parents[2]
CRD = yaml.safe_load((ROOT / "crds" / "weightsync.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

pytestmark = pytest.mark.usefixtures("crds")


def weightsync(name: str = "policy", **spec: Any) -> dict[str, Any]:
    """A valid WeightSync with parts of its spec replaced."""
    good: dict[str, Any] = {
        "trainer": {"selector": {"matchLabels": {"app": "trainer"}}},
        "inference": {"selector": {"matchLabels": {"app": "vllm"}}},
    }
    return {
        "apiVersion": f"{GROUP}/{API_VERSION}",
        "kind": KIND,
        "metadata": {"name": name},
        "spec": {**good, **spec},
    }


def apply(apiserver: ApiServer, namespace: str, document: dict[str, Any], *arguments: str) -> str:
    return apiserver.kubectl("apply", "-n", namespace, "-f", "-", *arguments, stdin=json.dumps(document))


def read(apiserver: ApiServer, namespace: str, name: str = "policy") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(apiserver.kubectl("get", PLURAL, name, "-n", namespace, "-o", "json"))
    return found


def selector(**selector: Any) -> dict[str, Any]:
    return {"trainer": {"selector": selector}}


def check(**check: Any) -> dict[str, Any]:
    return {"strategy": {"steps": [{"members": 1, "check": check}]}}


BAD = {
    "empty selector": (
        selector(),
        "an empty selector would match every pod: give matchLabels or matchExpressions",
    ),
    "empty matchLabels": (selector(matchLabels={}), "an empty selector would match every pod"),
    "one selector for both": (
        {"inference": {"selector": {"matchLabels": {"app": "trainer"}}}},
        "trainer.selector and inference.selector are equal: give trainer and inference pods different labels",
    ),
    "In without values": (
        selector(matchExpressions=[{"key": "app", "operator": "In"}]),
        "operators In and NotIn need values; Exists and DoesNotExist take none",
    ),
    "Exists with values": (
        selector(matchExpressions=[{"key": "app", "operator": "Exists", "values": ["x"]}]),
        "operators In and NotIn need values; Exists and DoesNotExist take none",
    ),
    "unknown operator": (
        selector(matchExpressions=[{"key": "app", "operator": "Like", "values": ["x"]}]),
        'supported values: "In", "NotIn", "Exists", "DoesNotExist"',
    ),
    "label value with a space": (
        selector(matchLabels={"app": "my trainer"}),
        "spec.trainer.selector.matchLabels",
    ),
    "no copies": (
        {"trainer": {**selector(matchLabels={"a": "b"})["trainer"], "retainedVersions": 0}},
        "retainedVersions",
    ),
    "negative port": (
        {"transport": {"port": -1}},
        "port must be 0 (a free one is taken) or from 1024 to 65535",
    ),
    "privileged port": (
        {"transport": {"port": 443}},
        "port must be 0 (a free one is taken) or from 1024 to 65535",
    ),
    "port beyond all": (
        {"transport": {"port": 70000}},
        "port must be 0 (a free one is taken) or from 1024 to 65535",
    ),
    "port as text": ({"transport": {"port": "8000"}}, "spec.transport.port"),
    "no buffers": ({"transport": {"numBuffers": 0}}, "spec.transport.numBuffers"),
    "buffer without unit": (
        {"transport": {"bufferSize": "big"}},
        "bufferSize must be a quantity from 1Mi to 64Gi",
    ),
    "buffer too small": (
        {"transport": {"bufferSize": "4Ki"}},
        "bufferSize must be a quantity from 1Mi to 64Gi",
    ),
    "Gloo into GPU memory": (
        {"transport": {"backend": "Gloo"}, "dataPlane": {"staging": "Device"}},
        "it reaches the host's memory only, and staging Device and type Engine go by NCCL",
    ),
    "Gloo with the engine's own workers": (
        {"transport": {"backend": "Gloo"}, "dataPlane": {"type": "Engine"}, "verification": "None"},
        "transport.backend Gloo does not fit dataPlane",
    ),
    "Engine with staging": (
        {"dataPlane": {"type": "Engine", "staging": "Host"}, "verification": "None"},
        "dataPlane.type Engine has no staging: leave dataPlane.staging out or set it to None",
    ),
    "Engine with digest": (
        {"dataPlane": {"type": "Engine"}},
        "verification Digest needs dataPlane.type Sidecar: set verification to None with type Engine",
    ),
    "Engine with steps": (
        {"dataPlane": {"type": "Engine"}, "verification": "None", "strategy": {"steps": [{"members": 1}]}},
        "strategy.steps needs dataPlane.type Sidecar",
    ),
    "Sidecar without staging": (
        {"dataPlane": {"staging": "None"}},
        "dataPlane.type Sidecar always stages: set dataPlane.staging to Host or Device, or leave it out",
    ),
    "unknown plane": ({"dataPlane": {"type": "Magic"}}, 'supported values: "Sidecar", "Engine"'),
    "step of none": ({"strategy": {"steps": [{"members": 0}]}}, "spec.strategy.steps[0].members"),
    "step beyond all": ({"strategy": {"steps": [{"members": "101%"}]}}, "spec.strategy.steps[0].members"),
    "no steps": ({"strategy": {"steps": []}}, "spec.strategy.steps"),
    "step without members": (
        {"strategy": {"steps": [{"pause": {}}]}},
        "spec.strategy.steps[0].members: Required",
    ),
    "pause of no time": (
        {"strategy": {"steps": [{"members": 1, "pause": {"durationSeconds": 0}}]}},
        "durationSeconds",
    ),
    "check of nothing": (
        {"strategy": {"steps": [{"members": 1, "check": {}}]}},
        "a check asks exactly one, http or prometheus",
    ),
    "check of two things": (
        check(http={"url": "http://a"}, prometheus={"address": "http://b", "query": "up", "min": 1}),
        "a check asks exactly one, http or prometheus",
    ),
    "check of a file": (
        check(http={"url": "file:///etc/passwd"}),
        "url must begin with http:// or https:// and a host",
    ),
    "check without a host": (
        check(http={"url": "http:///path"}),
        "url must begin with http:// or https:// and a host",
    ),
    "check of an impossible status": (check(http={"url": "http://a", "status": 42}), "http.status"),
    "check of a value nowhere": (
        check(http={"url": "http://a", "json": {"equals": "ok"}}),
        "http.json.path: Required",
    ),
    "query without bounds": (
        check(prometheus={"address": "http://b", "query": "up"}),
        "give min, max or both, that the query's samples must keep to",
    ),
    "query with crossed bounds": (
        check(prometheus={"address": "http://b", "query": "up", "min": 2, "max": 1.5}),
        "min must not be above max",
    ),
    "query in the address": (
        check(prometheus={"address": "http://b/api?query=up", "query": "up", "min": 1}),
        "address must begin with http:// or https:// and a host, without a query",
    ),
    "check that is never asked": (
        check(http={"url": "http://a"}, intervalSeconds=60, deadlineSeconds=30),
        "deadlineSeconds must be at least intervalSeconds",
    ),
    "unknown end of a failure": (
        {"strategy": {"onFailure": "Panic"}},
        'supported values: "Hold", "Rollback"',
    ),
    "negative maxUnavailable": (
        {"strategy": {"maxUnavailable": -1}},
        "maxUnavailable must be a count from 0 or a percentage from 0% to 100%, such as 25%",
    ),
    "maxUnavailable beyond all": (
        {"strategy": {"maxUnavailable": "120%"}},
        "maxUnavailable must be a count from 0 or a percentage from 0% to 100%, such as 25%",
    ),
    "maxUnavailable as count in text": (
        {"strategy": {"maxUnavailable": "2"}},
        "maxUnavailable must be a count from 0 or a percentage from 0% to 100%, such as 25%",
    ),
    "pinned to nothing": (
        {"target": {"policy": "Pinned"}},
        "target.version is required with policy Pinned and must be left out with Latest",
    ),
    "latest with version": (
        {"target": {"version": 3}},
        "target.version is required with policy Pinned and must be left out with Latest",
    ),
    "latest with run": (
        {"target": {"run": "a"}},
        "target.run is only for policy Pinned, leave it out with Latest",
    ),
    "negative version": ({"target": {"policy": "Pinned", "version": -1}}, "spec.target.version"),
    "no time to join": ({"timeouts": {"joinSeconds": 0}}, "spec.timeouts.joinSeconds"),
    "less for all than for each": (
        {"timeouts": {"progressSeconds": 100}},
        "timeouts.progressSeconds must be at least joinSeconds + transferSeconds + commitSeconds: raise it",
    ),
    "unknown in-flight rule": (
        {"inference": {"selector": {"matchLabels": {"a": "b"}}, "inFlightRequests": "Drop"}},
        '"Keep"',
    ),
    "unknown verification": ({"verification": "Maybe"}, 'supported values: "Digest", "None"'),
    "misspelt field": ({"dataplane": {"type": "Engine"}}, 'unknown field "spec.dataplane"'),
}


@pytest.mark.parametrize(("spec", "sentence"), list(BAD.values()), ids=list(BAD))
def test_a_bad_spec_is_refused_with_its_sentence(
    apiserver: ApiServer, namespace: str, spec: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KubectlError) as refused:
        apply(apiserver, namespace, weightsync(**spec), "--dry-run=server")
    assert sentence in " ".join(str(refused.value).split())


def test_a_spec_without_selectors_is_refused(apiserver: ApiServer, namespace: str) -> None:
    document = weightsync()
    document["spec"] = {}
    with pytest.raises(KubectlError) as refused:
        apply(apiserver, namespace, document)
    assert "spec.trainer: Required" in str(refused.value)
    assert "spec.inference: Required" in str(refused.value)


def test_a_name_that_is_no_label_value_is_refused(apiserver: ApiServer, namespace: str) -> None:
    with pytest.raises(KubectlError) as refused:
        apply(apiserver, namespace, weightsync("n" * 64))
    assert "the name must have at most 63 characters" in str(refused.value)


def test_the_data_plane_type_can_not_be_changed(apiserver: ApiServer, namespace: str) -> None:
    apply(apiserver, namespace, weightsync())
    with pytest.raises(KubectlError) as refused:
        apply(apiserver, namespace, weightsync(dataPlane={"type": "Engine"}, verification="None"))
    assert "dataPlane.type can't be changed: delete this WeightSync and create another one" in str(
        refused.value
    )


GOOD: dict[str, dict[str, Any]] = {
    "everything said": {
        "trainer": {
            "selector": {
                "matchLabels": {"app": "trainer"},
                "matchExpressions": [
                    {"key": "tier", "operator": "NotIn", "values": ["canary"]},
                    {"key": "gpu", "operator": "Exists"},
                ],
            },
            "retainedVersions": 3,
        },
        "inference": {
            "selector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["vllm"]}]},
            "initialWeights": "Serve",
            "inFlightRequests": "Wait",
        },
        "dataPlane": {"type": "Sidecar", "staging": "Host"},
        "transport": {"backend": "Gloo", "bufferSize": "1.5Gi", "numBuffers": 2, "port": 29500},
        "strategy": {"maxUnavailable": 2},
        "verification": "None",
        "target": {"policy": "Latest"},
        "timeouts": {"joinSeconds": 10, "transferSeconds": 20, "commitSeconds": 5, "progressSeconds": 35},
        "paused": True,
    },
    "later: the engine's own workers": {"dataPlane": {"type": "Engine"}, "verification": "None"},
    "GPU memory": {"dataPlane": {"staging": "Device"}, "transport": {"backend": "NCCL"}},
    "GPU memory, by NCCL without saying so": {"dataPlane": {"staging": "Device"}},
    "NCCL into the host's memory": {"dataPlane": {"staging": "Host"}, "transport": {"backend": "NCCL"}},
    "a tensor at a time": {"transport": {"mode": "PerTensor"}},
    "waves": {"strategy": {"steps": [{"members": 1, "pause": {}}, {"members": "100%"}]}},
    "checks": {
        "strategy": {
            "onFailure": "Rollback",
            "steps": [
                {
                    "members": 1,
                    "check": {
                        "http": {
                            "url": "https://eval.ns:8443/v1?x=y",
                            "json": {"path": "a.0", "equals": "ok"},
                        },
                        "intervalSeconds": 5,
                        "deadlineSeconds": 60,
                    },
                },
                {
                    "members": "50%",
                    "pause": {"durationSeconds": 60},
                    "check": {"prometheus": {"address": "http://prom:9090/sub", "query": "up", "max": 0.01}},
                },
            ],
        }
    },
    "a pinned version": {"target": {"policy": "Pinned", "version": 7, "run": "a"}},
    "all may fail": {"strategy": {"maxUnavailable": "100%"}},
}


@pytest.mark.parametrize("spec", list(GOOD.values()), ids=list(GOOD))
def test_a_good_spec_is_taken_and_read(apiserver: ApiServer, namespace: str, spec: dict[str, Any]) -> None:
    apply(apiserver, namespace, weightsync(**spec))
    parsed = parse_spec(read(apiserver, namespace)["spec"])
    assert bool(parsed.unsupported) == any(
        spec is each for name, each in GOOD.items() if name.startswith("later")
    )


def test_what_is_left_out_gets_its_default(apiserver: ApiServer, namespace: str) -> None:
    document = weightsync()
    apply(apiserver, namespace, document)
    stored = read(apiserver, namespace)["spec"]
    assert stored == {
        "trainer": {"selector": {"matchLabels": {"app": "trainer"}}, "retainedVersions": 2},
        "inference": {
            "selector": {"matchLabels": {"app": "vllm"}},
            "initialWeights": "Withhold",
            "inFlightRequests": "Keep",
        },
        "dataPlane": {"type": "Sidecar"},
        "transport": {"mode": "Packed", "bufferSize": "256Mi", "numBuffers": 3, "port": 0},
        "strategy": {"maxUnavailable": "25%", "onFailure": "Hold"},
        "verification": "Digest",
        "target": {"policy": "Latest"},
        "timeouts": {"joinSeconds": 60, "transferSeconds": 300, "commitSeconds": 60, "progressSeconds": 900},
        "paused": False,
    }
    # The operator's own defaults, for what it reads, are the same.
    assert parse_spec(stored) == parse_spec(document["spec"])


def full_status() -> Status:
    time = "2026-01-02T03:04:05Z"
    return Status(
        observed_generation=1,
        term=3,
        current=CurrentVersion("run-1", 41, "xxh3-128:00", time),
        group=GroupStatus(epoch=9, world_size=2, endpoint="10.0.0.1:29500", members=("0:1:trainer-0:uid",)),
        synced="1/2",
        members=MemberCounts(total=2, synced=1),
        conditions=(
            ConditionStatus("Ready", "True", "RollingOut", "version run-1/42 goes to 2 members", time, 1),
            ConditionStatus("Progressing", "True", "Transferring", "epoch 9", time, 1),
        ),
    )


def write_status(apiserver: ApiServer, namespace: str, status: dict[str, Any]) -> None:
    patch = json.dumps({"status": status})
    apiserver.kubectl(
        *("patch", PLURAL, "policy", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    )


def test_get_shows_the_columns(apiserver: ApiServer, namespace: str) -> None:
    apply(apiserver, namespace, weightsync())
    rollout = {"run": "run-1", "version": 42, "outcome": "InProgress"}
    write_status(apiserver, namespace, {**status_document(full_status()), "rollout": rollout})
    header, row = apiserver.kubectl("get", "ws", "-n", namespace).splitlines()
    assert header.split() == ["NAME", "READY", "VERSION", "TARGET", "SYNCED", "REASON", "AGE"]
    assert row.split()[:-1] == ["policy", "True", "41", "42", "1/2", "Transferring"]
    header, row = apiserver.kubectl("get", "ws", "-n", namespace, "-o", "wide").splitlines()
    assert header.split() == [
        "NAME",
        "READY",
        "VERSION",
        "TARGET",
        "SYNCED",
        "REASON",
        "EPOCH",
        "MESSAGE",
        "AGE",
    ]
    assert "9       version run-1/42 goes to 2 members" in row


def test_wait_works_on_conditions(apiserver: ApiServer, namespace: str) -> None:
    apply(apiserver, namespace, weightsync())
    write_status(apiserver, namespace, status_document(full_status()))
    arguments = ("wait", "--for=condition=Ready", f"{PLURAL}/policy", "-n", namespace, "--timeout=5s")
    assert "condition met" in apiserver.kubectl(*arguments)


def test_conditions_are_one_row_a_type(apiserver: ApiServer, namespace: str) -> None:
    apply(apiserver, namespace, weightsync())
    status = status_document(full_status())
    status["conditions"].append(copy.deepcopy(status["conditions"][0]))
    with pytest.raises(KubectlError) as refused:
        write_status(apiserver, namespace, status)
    assert "Duplicate value" in str(refused.value)


def test_spec_and_status_are_written_apart(apiserver: ApiServer, namespace: str) -> None:
    apply(apiserver, namespace, weightsync())
    patch = json.dumps({"status": {"term": 99}})
    apiserver.kubectl("patch", PLURAL, "policy", "-n", namespace, "--type=merge", "-p", patch)
    assert "status" not in read(apiserver, namespace)


def test_explain_describes_every_field(apiserver: ApiServer) -> None:
    text = apiserver.kubectl("explain", "weightsync.spec", "--recursive=false")
    assert "How weights get into the engines." in " ".join(text.split())
    text = apiserver.kubectl("explain", "weightsync.spec.strategy.steps")
    assert "Waves of members that switch one after the other" in " ".join(text.split())
    text = apiserver.kubectl("explain", "weightsync.spec.dataPlane.type")
    assert "not yet supported: planned for 0.2" in " ".join(text.split())
    assert not list(undescribed("spec", SCHEMA["properties"]["spec"]))
    assert not list(undescribed("status", SCHEMA["properties"]["status"]))


def undescribed(path: str, schema: dict[str, Any]) -> Any:
    for name, field in schema.get("properties", {}).items():
        if not field.get("description"):
            yield f"{path}.{name}"
        yield from undescribed(f"{path}.{name}", field)
    if "items" in schema:
        yield from undescribed(f"{path}[]", schema["items"])


def test_the_status_schema_is_the_model() -> None:
    assert not list(differences(Status, SCHEMA["properties"]["status"], "status"))


# Kubernetes' own rule for conditions; the operator always sets it.
REQUIRED_BY_CONVENTION = {"status.conditions[].lastTransitionTime"}


def differences(kind: Any, schema: dict[str, Any], path: str) -> Any:
    """Where a dataclass and a schema part, as sentences."""
    if get_origin(kind) in (Union, type(int | None)):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = {camel(field.name): field for field in fields(kind)}
        if set(names) != set(schema["properties"]):
            yield f"{path}: fields {sorted(set(names) ^ set(schema['properties']))} are on one side only"
            return
        required = {
            name
            for name, field in names.items()
            if (field.default is MISSING and field.default_factory is MISSING)
            or f"{path}.{name}" in REQUIRED_BY_CONVENTION
        }
        if required != set(schema.get("required", ())):
            yield f"{path}: required {sorted(schema.get('required', ()))}, the model needs {sorted(required)}"
        for name, field in names.items():
            yield from differences(hints[field.name], schema["properties"][name], f"{path}.{name}")
    elif get_origin(kind) is tuple:
        if schema["type"] != "array":
            yield f"{path}: no array"
        yield from differences(get_args(kind)[0], schema["items"], f"{path}[]")
    elif issubclass(kind, Enum):
        if schema.get("enum") != [each.value for each in kind]:
            yield f"{path}: enum {schema.get('enum')}"
    elif schema["type"] != {str: "string", int: "integer", bool: "boolean"}[kind]:
        yield f"{path}: type {schema['type']}"


def test_differences_are_found() -> None:
    broken = copy.deepcopy(SCHEMA["properties"]["status"])
    broken["properties"]["term"]["type"] = "string"
    broken["properties"]["group"]["properties"].pop("endpoint")
    broken["properties"]["rollout"]["properties"]["outcome"]["enum"].remove("Failed")
    broken["properties"]["current"]["required"] = ["run"]
    paths = {each.split(":")[0] for each in differences(Status, broken, "status")}
    assert paths == {"status.term", "status.group", "status.rollout.outcome", "status.current"}
