"""The operator's own authority at a real API server: its processes, real agents, real TLS.

No kubelet runs: `Bundles.mounted` stands in for it and brings the ConfigMap into a file.
"""

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from aiohttp import ClientError, ClientSession
from cluster_objects import ClusterObjects
from kubernetes import client
from operated import SOON, Operated, operated
from operator_process import OperatorProcess
from trusting_agents import Bundles, TrustingAgent, handshake

from weightsync_contract.names import CA_FILE, CA_NAME, LABEL_CA_OF, SESSION_PATH
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.pki.certificates import issue, make_ca
from weightsync_operator.pki.core import Authorities
from weightsync_operator.pki.stored import secret_document
from weightsync_operator.pki.times import PkiTimes

ROOT = Path(__file__).parents[2]
WOKEN = ("--session-service", "weightsync-operator", "--session-host", "127.0.0.1")
"""Looks each half minute, and at once when something tells it to."""
SERVICE = (*WOKEN, "--ca-check", "0.25")
GRACE, CERTIFICATE = 2.0, 8.0
SHORT = ("--ca-grace", f"{GRACE}", "--certificate-lifetime", f"{CERTIFICATE}")
"""A rotation that began takes some twelve seconds."""

pytestmark = pytest.mark.usefixtures("crds")


@pytest.fixture
async def world(
    apiserver: ApiServer, api_client: client.ApiClient, namespace: str, tmp_path: Path
) -> AsyncIterator[Operated]:
    async with operated(ClusterObjects(api_client, namespace), apiserver.kubeconfig, tmp_path) as made:
        yield made


@pytest.fixture
def bundles(world: Operated, tmp_path: Path) -> Bundles:
    # The stand-in for the kubelet may take half of the grace.
    return Bundles(world.objects, tmp_path / "ca.crt", GRACE / 2)


def address(operator: OperatorProcess) -> str:
    return operator.url.removeprefix("http://")


async def trusting(
    world: Operated, bundles: Bundles, tmp_path: Path, name: str = "trainer-0"
) -> TrustingAgent:
    pod = await asyncio.to_thread(world.objects.pod, name, "trainer", "trainer")
    token = await asyncio.to_thread(world.objects.token, pod)
    return TrustingAgent(tmp_path / name, f"wss://{address(world.operators[0])}", pod, token, bundles.file)


async def event(world: Operated, reason: str, part: str = "") -> str:
    """The message of an Event with ``part`` in it, once it is there."""
    for _ in range(200):
        for each in await asyncio.to_thread(world.objects.events):
            if each.reason == reason and part in each.message:
                return str(each.message)
        await asyncio.sleep(0.05)
    raise AssertionError(f"no Event {reason} {part}")


async def test_agents_dial_with_the_bundle_that_comes_with_a_weightsync(
    world: Operated, bundles: Bundles, tmp_path: Path
) -> None:
    operator = await world.start(*SERVICE)
    agent = await trusting(world, bundles, tmp_path)
    async with agent.running():
        # Nothing to check with yet: said, and tried again.
        await agent.until_said("is not there: the operator writes the ConfigMap", 2)
        assert await asyncio.to_thread(bundles.configmap) is None
        await asyncio.to_thread(world.objects.weightsync)
        async with bundles.mounted():
            await agent.until_said("session opened")

    bundle = (await bundles.until(lambda found: True, "at all")).data[CA_FILE]
    assert "PRIVATE" not in bundle
    namespace = world.objects.namespace
    for name in ("weightsync-operator", f"weightsync-operator.{namespace}.svc", "127.0.0.1"):
        await asyncio.to_thread(handshake, address(operator), bundle, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        await asyncio.to_thread(handshake, address(operator), bundle, "weightsync-operator.elsewhere.svc")

    await asyncio.to_thread(world.objects.core.delete_namespaced_config_map, CA_NAME, namespace)
    await bundles.until(lambda found: found.data[CA_FILE] == bundle, "again")
    changed = {"data": {CA_FILE: "nonsense"}}
    await asyncio.to_thread(world.objects.core.patch_namespaced_config_map, CA_NAME, namespace, changed)
    await bundles.until(lambda found: found.data[CA_FILE] == bundle, "repaired")


async def test_whoever_is_not_trusted_or_not_encrypted_is_refused(
    world: Operated, bundles: Bundles, tmp_path: Path
) -> None:
    operator = await world.start(*WOKEN)
    await asyncio.to_thread(world.objects.weightsync)
    # At once, not with the next look.
    bundle = (await bundles.until(lambda found: True, "at all", 10)).data[CA_FILE]
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol|version|EOF"):
        await asyncio.to_thread(handshake, address(operator), bundle, "", ssl.TLSVersion.TLSv1_2)
    async with ClientSession() as http:
        with pytest.raises(ClientError):
            await http.ws_connect(operator.url + SESSION_PATH)
    # Somebody else's authority of the same name.
    other = make_ca(datetime.now(UTC), PkiTimes()).certificate
    await asyncio.to_thread(bundles.file.write_text, other)
    agent = await trusting(world, bundles, tmp_path)
    async with agent.running():
        await agent.until_said("has signed it", 2)
        assert not agent.count("session opened")


async def until(condition: Callable[[], bool], meanwhile: "asyncio.Task[None]") -> None:
    """Look again and again; ``meanwhile`` must not end."""
    deadline = asyncio.get_running_loop().time() + 60
    while not await asyncio.to_thread(condition):
        if meanwhile.done():
            meanwhile.result()
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


class Dials:
    """Handshakes with all replicas, one after the other, with the bundle that is mounted at that time."""

    def __init__(self, operators: list[OperatorProcess], bundle: Path) -> None:
        self._operators, self._bundle = operators, bundle
        self.issuers: dict[str, list[str]] = {each.name: [] for each in operators}
        self.made = 0

    async def run(self) -> None:
        """For ever. Raises what a dial raises."""
        while True:
            for each in self._operators:
                text = await asyncio.to_thread(self._bundle.read_text)
                certificate = await asyncio.to_thread(handshake, address(each), text)
                issuer = dict(pair for row in certificate["issuer"] for pair in row)["commonName"]
                if issuer not in self.issuers[each.name]:
                    self.issuers[each.name].append(issuer)
                self.made += 1
            await asyncio.sleep(0.02)


async def test_a_rotation_breaks_no_dial_and_closes_no_session(
    world: Operated, bundles: Bundles, tmp_path: Path
) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    started = [await world.start(*SERVICE, *SHORT, *SOON) for _ in range(2)]
    old = (await bundles.until(lambda found: True, "at all")).data[CA_FILE]
    seen: list[str] = []

    def step() -> str:
        """Which certificates the Secret holds."""
        data = bundles.secret().data
        names = "+".join(name for name in ("tls.crt", "next.crt", "old.crt") if name in data)
        if not seen or seen[-1] != names:
            seen.append(names)
        return names

    async with bundles.mounted():
        agent = await trusting(world, bundles, tmp_path)
        async with agent.running():
            await agent.until_said("session opened")
            dials = Dials(started, bundles.file)
            dialling = asyncio.create_task(dials.run())
            await until(lambda: dials.made >= 10, dialling)
            # The first step, when it suits the test; the leader does all others.
            successor = make_ca(datetime.now(UTC), PkiTimes())
            first_step = {"stringData": {"next.crt": successor.certificate, "next.key": successor.key}}
            namespace = world.objects.namespace
            core = world.objects.core
            await asyncio.to_thread(core.patch_namespaced_secret, CA_NAME, namespace, first_step)
            await until(lambda: step() == "tls.crt" and len(seen) > 1, dialling)
            # Some more, when nobody trusts the old one any more.
            await until(lambda: bundles.file.read_text() == successor.certificate, dialling)
            enough = dials.made + 20
            await until(lambda: dials.made >= enough, dialling)
            dialling.cancel()
            await asyncio.gather(dialling, return_exceptions=True)
            # Open all the time.
            assert (agent.count("session opened"), agent.count("session closed")) == (1, 0), agent.log()

    assert seen == ["tls.crt+next.crt", "tls.crt+old.crt", "tls.crt"]
    # Each replica served with both.
    assert [len(issuers) for issuers in dials.issuers.values()] == [2, 2]
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(handshake, address(started[0]), old)


async def test_an_authority_that_is_due_is_rotated_by_itself(world: Operated, bundles: Bundles) -> None:
    core, namespace = world.objects.core, world.objects.namespace
    due = make_ca(datetime.now(UTC) - timedelta(days=250), PkiTimes())
    secret = secret_document(Authorities(due), namespace, None)
    await asyncio.to_thread(core.create_namespaced_secret, namespace, secret)
    await asyncio.to_thread(world.objects.weightsync)
    operator = await world.start(*SERVICE, *SHORT)
    done = await bundles.until(
        lambda found: due.certificate not in found.data[CA_FILE], "without the old one"
    )
    await asyncio.to_thread(handshake, address(operator), done.data[CA_FILE])
    log = operator.log.read_text()
    steps = ["made the next authority", "every namespace trusts the next", "signs now", "trusted no more"]
    assert [log.find(each) for each in steps] == sorted(log.find(each) for each in steps)
    assert log.find(steps[0]) >= 0


async def test_replicas_share_one_authority_and_a_new_leader_keeps_it(
    world: Operated, bundles: Bundles
) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    replicas = await asyncio.gather(*(world.start(*SERVICE, *SOON) for _ in range(3)))
    found = await bundles.until(lambda found: True, "at all")
    bundle = found.data[CA_FILE]
    assert bundle.count("BEGIN CERTIFICATE") == 1
    serials = {
        (await asyncio.to_thread(handshake, address(each), bundle))["serialNumber"] for each in replicas
    }
    assert len(serials) == 3
    leases = world.objects.leases
    lease = await asyncio.to_thread(
        leases.read_namespaced_lease, "weightsync-operator", world.objects.namespace
    )
    leader = next(each for each in replicas if lease.spec.holder_identity.startswith(each.name))
    await asyncio.to_thread(leader.kill)
    await asyncio.to_thread(world.objects.core.delete_namespaced_config_map, CA_NAME, world.objects.namespace)
    # Nobody but the next leader can bring it back.
    await bundles.until(lambda found: found.data[CA_FILE] == bundle, "from the next leader")


async def test_an_authority_that_is_gone_or_broken_is_replaced_and_said(
    world: Operated, bundles: Bundles, tmp_path: Path
) -> None:
    operator = await world.start(*SERVICE)
    await asyncio.to_thread(world.objects.weightsync)
    core, namespace = world.objects.core, world.objects.namespace
    async with bundles.mounted():
        agent = await trusting(world, bundles, tmp_path)
        async with agent.running():
            await agent.until_said("session opened")
            first = (await bundles.until(lambda found: True, "at all")).data[CA_FILE]
            await asyncio.to_thread(core.delete_namespaced_secret, CA_NAME, namespace)
            second = (await bundles.until(lambda found: found.data[CA_FILE] != first, "anew")).data[CA_FILE]
            message = await event(world, "AuthorityReplaced")
            assert f"Secret {namespace}/{CA_NAME} had to be replaced: it was deleted" in message
            broken = {"data": {"tls.key": base64.b64encode(b"x").decode()}}
            await asyncio.to_thread(core.patch_namespaced_secret, CA_NAME, namespace, broken)
            third = (await bundles.until(lambda found: found.data[CA_FILE] != second, "anew")).data[CA_FILE]
            await event(world, "AuthorityReplaced", "tls.crt, tls.key: no private key")
            await asyncio.to_thread(handshake, address(operator), third)
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.to_thread(handshake, address(operator), first)
            # The session is not touched.
            assert (agent.count("session opened"), agent.count("session closed")) == (1, 0)
    assert await asyncio.to_thread(operator.get, "/readyz") == (200, "ok\n")


async def test_what_others_own_is_left_alone_and_said(world: Operated, bundles: Bundles) -> None:
    core, namespace = world.objects.core, world.objects.namespace
    foreign = {"metadata": {"name": CA_NAME}, "data": {CA_FILE: "theirs"}}
    await asyncio.to_thread(core.create_namespaced_config_map, namespace, foreign)
    await asyncio.to_thread(world.objects.weightsync)
    await world.start(*SERVICE)
    assert "was made by somebody else and is left as it is" in await event(world, "BundleNotOurs")
    assert (await asyncio.to_thread(bundles.configmap)).data == {CA_FILE: "theirs"}
    await asyncio.to_thread(core.delete_namespaced_config_map, CA_NAME, namespace)
    found = await bundles.until(lambda found: found.data[CA_FILE] != "theirs", "of ours")
    assert found.metadata.labels == {LABEL_CA_OF: namespace}


async def test_somebody_elses_secret_makes_the_replica_not_ready(world: Operated) -> None:
    core, namespace = world.objects.core, world.objects.namespace
    foreign = {"metadata": {"name": CA_NAME}, "stringData": {"tls.crt": "theirs"}}
    before = await asyncio.to_thread(core.create_namespaced_secret, namespace, foreign)
    await asyncio.to_thread(world.objects.weightsync)
    with pytest.raises(AssertionError, match="is not this operator's and is left as it is"):
        await world.start(*SERVICE, ready_seconds=6)
    after = await asyncio.to_thread(core.read_namespaced_secret, CA_NAME, namespace)
    assert after.data == before.data
    assert "--session-cert" in await event(world, "AuthorityNotOurs")


async def test_a_certificate_of_somebody_elses_is_read_again_when_it_changes(
    world: Operated, tmp_path: Path
) -> None:
    now, times = datetime.now(UTC), PkiTimes()
    ca = make_ca(now, times)
    files = tmp_path / "tls.crt", tmp_path / "tls.key"

    def write() -> None:
        leaf = issue(ca, ["op"], ["127.0.0.1"], now, times)
        files[0].write_bytes(leaf.certificate)
        files[1].write_bytes(leaf.key)

    write()
    operator = await world.start(
        *("--session-cert", str(files[0]), "--session-key", str(files[1]), "--session-host", "127.0.0.1")
    )
    before = await asyncio.to_thread(handshake, address(operator), ca.certificate)
    await asyncio.to_thread(write)
    for _ in range(150):
        after = await asyncio.to_thread(handshake, address(operator), ca.certificate)
        if after["serialNumber"] != before["serialNumber"]:
            break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError("still the certificate of before")
    assert operator.running


async def test_the_role_in_examples_is_enough_and_nothing_is_too_much(
    world: Operated, bundles: Bundles, apiserver: ApiServer, tmp_path: Path
) -> None:
    await asyncio.to_thread(apiserver.kubectl, "apply", "-f", str(ROOT / "examples" / "operator-rbac.yaml"))
    account = ("weightsync-operator", "-n", "weightsync-system")
    token = await asyncio.to_thread(apiserver.kubectl, "create", "token", *account)
    kubeconfig = yaml.safe_load(apiserver.kubeconfig.read_text())
    kubeconfig["users"][0]["user"] = {"token": token.strip()}
    weak = tmp_path / "weak"
    weak.write_text(yaml.safe_dump(kubeconfig))

    await asyncio.to_thread(world.objects.weightsync)
    operator = await world.start(*SERVICE, kubeconfig=weak, lease="weightsync-system")
    bundle = (await bundles.until(lambda found: True, "at all")).data[CA_FILE]
    await asyncio.to_thread(handshake, address(operator), bundle)
    # Updating is allowed, too.
    core, namespace = world.objects.core, world.objects.namespace
    await asyncio.to_thread(core.patch_namespaced_config_map, CA_NAME, namespace, {"data": {CA_FILE: "x"}})
    await bundles.until(lambda found: found.data[CA_FILE] == bundle, "repaired")
    assert ": 403 " not in operator.log.read_text()

    def may(verb: str, resource: str, *where: str) -> bool:
        try:
            apiserver.kubectl(
                *("auth", "can-i", verb, resource, *(where or ("-A",))),
                "--as=system:serviceaccount:weightsync-system:weightsync-operator",
            )
        except Exception:
            return False
        return True

    own = ("-n", "weightsync-system")
    assert await asyncio.to_thread(may, "get", f"secrets/{CA_NAME}", *own)
    for verb, resource, where in [
        ("get", "secrets", ()),
        ("list", "secrets", own),
        ("get", "secrets/other", own),
        ("create", "secrets", ()),
        ("delete", f"secrets/{CA_NAME}", own),
        ("list", "configmaps", ()),
        ("update", "configmaps/kube-root-ca.crt", ()),
        ("delete", f"configmaps/{CA_NAME}", ()),
    ]:
        assert not await asyncio.to_thread(may, verb, resource, *where), f"may {verb} {resource} {where}"
