"""The doctor has nothing to object to in the pods that the chart makes of the examples."""

import yaml
from chart_pods import Object, create
from chart_release import ROOT

from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.cli.core.doctor.cluster_checks import check_crd
from weightsync_operator.cli.core.doctor.facts import Facts, Got
from weightsync_operator.cli.core.doctor.findings import Level
from weightsync_operator.cli.core.doctor.fleet_checks import check_pods, check_selectors

EXAMPLES = ROOT / "examples" / "on-a-cluster"


def pods_of(cluster: ApiServer, file: str, namespace: str) -> list[Object]:
    made = []
    for document in yaml.safe_load_all((EXAMPLES / file).read_text()):
        if document["kind"] == "Deployment":
            template = document["spec"]["template"]
            metadata = template["metadata"] | {"name": document["metadata"]["name"], "namespace": namespace}
            spec = {"serviceAccountName": "default"} | template["spec"]
            made.append(
                create(cluster, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
            )
    return made


def test_what_the_examples_make_is_sound(installed: ApiServer, place: str) -> None:
    pods = [*pods_of(installed, "trainer.yaml", place), *pods_of(installed, "vllm.yaml", place)]
    assert len(pods) == 2
    document = yaml.safe_load((EXAMPLES / "weightsync.yaml").read_text())
    crds = installed.kubectl("get", "crd", "weightsyncs.weightsync.dev", "--output=yaml")
    facts = Facts(
        **dict.fromkeys(Facts.__dataclass_fields__, Got())
        | {
            "namespace": place,
            "pods": Got(tuple(pods)),
            "crd": Got((yaml.safe_load(crds),)),
            "weightsyncs": (document,),
            "neighbours": (document,),
        }
    )
    found = [*check_selectors(facts, document), *check_pods(facts, document), *check_crd(facts)]
    assert [each.message for each in found if each.level is not Level.FINE] == []
    assert "2 pods of policy can take part" in {each.message for each in found}
