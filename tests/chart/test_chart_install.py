"""helm and a real API server: what is installed, upgraded and left behind."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from chart_pods import POLICY_SECONDS, container, create, make_namespace, new_pod
from chart_release import CHART, NAMESPACE, RELEASE, Helm, as_arguments, named

from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries
from weightsync_demo.kube.errors import KubectlError
from weightsync_demo.waiting import wait_for

VALUES = sorted((Path(__file__).parent / "values").glob("*.yaml"))


@pytest.fixture(scope="module")
def own(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A cluster that nothing was installed in."""
    with run_apiserver(tmp_path_factory.mktemp("install"), binaries) as server:
        yield server


@pytest.mark.parametrize("values", [None, *VALUES], ids=lambda path: path.stem if path else "defaults")
def test_an_api_server_takes_all_that_is_rendered(own: ApiServer, helm: Helm, values: Path | None) -> None:
    for name in (NAMESPACE, "team", "team-b"):
        with contextlib.suppress(KubectlError):  # there since the case before
            own.kubectl("create", "namespace", name)
    files = (values,) if values else ()
    kinds = [f"admissionregistration.k8s.io/v1/{kind}AdmissionPolicy" for kind in ("Mutating", "Validating")]
    # Prometheus Operator's kinds are no API server's own; test_chart_monitoring looks at these.
    objects = [each for each in helm.template(*files, has=kinds) if "coreos" not in each["apiVersion"]]
    made = own.kubectl(
        # A field that the API does not know is an error.
        *("create", "--validate=strict", "--dry-run=server", "--output=name", "--filename=-"),
        stdin=yaml.safe_dump_all(objects),
    )
    assert len(made.splitlines()) == len(objects)


def test_the_operators_pod_is_restricted(own: ApiServer, helm: Helm) -> None:
    place = make_namespace(own)
    template = named(helm.template(), "Deployment")["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "operator", "namespace": place, "labels": template["metadata"]["labels"]},
        "spec": template["spec"],
    }
    own.kubectl("create", "serviceaccount", template["spec"]["serviceAccountName"], f"--namespace={place}")
    made = create(own, pod)
    (container,) = made["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_release_comes_is_upgraded_and_goes_without_taking_a_weightsync_along(
    own: ApiServer, helm: Helm
) -> None:
    here = helm.on(own.kubeconfig)
    # The kinds that this server has decide: it is asked, not guessed.
    notes = here.install(NAMESPACE)
    assert "each new one gets an agent" in notes
    own.kubectl(
        "get", "mutatingadmissionpolicies.v1.admissionregistration.k8s.io", "weightsync-operator-inject"
    )
    weightsync = Path(CHART.parents[1] / "examples/on-a-cluster/weightsync.yaml")
    own.kubectl("wait", "--for=condition=Established", "crd/weightsyncs.weightsync.dev", "--timeout=30s")
    own.kubectl("apply", f"--filename={weightsync}", "--namespace=default")

    here.install(NAMESPACE, replicas=3, image={"repository": "weightsync/operator", "tag": "0.2.0"})
    deployment = json.loads(
        own.kubectl("get", "deployment", "weightsync-operator", f"--namespace={NAMESPACE}", "--output=json")
    )
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "weightsync/operator:0.2.0"

    here.run("uninstall", RELEASE, f"--namespace={NAMESPACE}")
    assert own.kubectl("get", "weightsync", "policy", "--namespace=default", "--output=name")
    left = own.kubectl(
        *("get", "--all-namespaces", "--selector=app.kubernetes.io/part-of=weightsync", "--output=name"),
        "deployments,services,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,poddisruptionbudgets,"
        "mutatingadmissionpolicies,mutatingadmissionpolicybindings,validatingadmissionpolicies",
    )
    assert left == ""

    # What was left is taken up again by the next one.
    here.install(NAMESPACE)
    assert "weightsync" in here.run("list", f"--namespace={NAMESPACE}", "--short")
    # Its policies are for all namespaces, the other tests' too.
    here.run("uninstall", RELEASE, f"--namespace={NAMESPACE}")


def test_two_releases_for_two_namespaces_stand_side_by_side(own: ApiServer, helm: Helm) -> None:
    here = helm.on(own.kubeconfig)
    for name in ("one", "two"):
        place = make_namespace(own)
        here.run(
            *("upgrade", "--install", name, str(CHART), f"--namespace={place}"),
            *as_arguments({"watchNamespace": place, "crds": {"enabled": False}}),
        )
        policy = f"weightsync-operator-{place}-inject"
        found = json.loads(own.kubectl("get", "mutatingadmissionpolicy", policy, "--output=json"))
        assert found["spec"]["matchConstraints"]["namespaceSelector"] == {
            "matchLabels": {"kubernetes.io/metadata.name": place}
        }


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (("Validating",), "put it into the pod's template, as examples/on-a-cluster/sidecar does"),
        (("Validating", "Mutating"), "none was injected: is there still the MutatingAdmissionPolicy"),
    ],
)
def test_a_pod_that_nobody_gave_its_agent_is_refused(
    own: ApiServer, helm: Helm, kinds: tuple[str, ...], said: str
) -> None:
    place = make_namespace(own)
    has = [f"admissionregistration.k8s.io/v1/{kind}AdmissionPolicy" for kind in kinds]
    # The one that injects is left out, as if somebody had deleted it.
    policies = helm.template(has=has, show="templates/refusal.yaml", watchNamespace=place)
    own.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(policies))

    def refusal() -> str:
        try:
            create(own, new_pod(place))
        except KubectlError as error:
            return str(error)
        return ""

    assert said in wait_for(refusal, POLICY_SECONDS, "the policy that refuses to be in force")
    create(own, new_pod(place, initContainers=[container("weightsync-agent", restartPolicy="Always")]))
