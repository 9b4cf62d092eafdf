"""A machine that runs pods: containerd, kubelet and kube-proxy."""

import json
import uuid
from pathlib import Path

import yaml

from weightsync_cluster.addresses import (
    API_URL,
    CONTROL_ADDRESS,
    DOMAIN,
    POD_NETWORK,
    Node,
)
from weightsync_cluster.images import PAUSE
from weightsync_cluster.machine import Spec, Unit
from weightsync_cluster.pki import Authority, write_kubeconfig
from weightsync_cluster.place import SHADOWED
from weightsync_cluster.tools import Tools
from weightsync_demo.kube.build import Binaries

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
# A node says that it lives every quarter of this.
LEASE_S = 12
# What the kubelet wants of the machine; it changes what is otherwise, and it is the whole machine's. A node
# sees files of its own in their place.
KERNEL_SETTINGS = {
    "kernel/keys/root_maxbytes": "25000000",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
}


def write_configuration(directory: Path, node: Node, authority: Authority, tools: Tools, cgroup: str) -> None:
    """Write what a node's programs read into `directory`/etc."""
    etc = directory / "etc"
    (etc / "cni").mkdir(parents=True)
    authority.own.write(etc / "ca")
    (etc / "ca.key").unlink()
    authority.issue(f"system:node:{node.name}", serves=[node.address, node.name]).write(etc / "kubelet")
    kubelet = authority.issue(f"system:node:{node.name}", groups=["system:nodes"])
    write_kubeconfig(etc / "kubelet.kubeconfig", API_URL, authority, kubelet, node.name)
    proxy = authority.issue("system:kube-proxy")
    write_kubeconfig(etc / "proxy.kubeconfig", API_URL, authority, proxy, node.name)
    (etc / "kubelet.yaml").write_text(yaml.safe_dump(_kubelet(etc, node, cgroup)))
    (etc / "proxy.yaml").write_text(yaml.safe_dump(_proxy(etc, node)))
    (etc / "containerd.toml").write_text(_containerd(etc, tools))
    (etc / "cni" / "10-bridge.conflist").write_text(json.dumps(_network(node)))


def spec(
    directory: Path, log_directory: Path, node: Node, binaries: Binaries, environment: dict[str, str]
) -> Spec:
    """What runs on a node, with its configuration, its disk and its life's own files in `directory`."""
    etc, disk, life = directory / "etc", directory / "disk", directory / "life"
    for folder in (*(disk / name for name in ("upper", "work", "kubelet", "containerd")), life):
        folder.mkdir(parents=True, exist_ok=True)
    commands = [
        ["hostname", node.name],
        ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"],
        # Volumes that a container mounts are to be seen by the others of its pod.
        ["mount", "--make-rshared", "/"],
        ["mount", "-t", "tmpfs", "tmpfs", "/run"],
    ]
    for shadowed in SHADOWED:
        name = shadowed.rpartition("/")[2]
        upper, work = disk / "upper" / name, disk / "work" / name
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        layers = f"lowerdir={shadowed},upperdir={upper},workdir={work}"
        commands.append(["mount", "-t", "overlay", "-o", layers, "overlay", shadowed])
    for name in ("kubelet", "containerd"):
        # An overlay can't be made on an overlay, and containers' file systems are overlays.
        commands.append(["mkdir", "-p", f"/var/lib/{name}"])
        commands.append(["mount", "--bind", str(disk / name), f"/var/lib/{name}"])
    # Each life has another boot id, by which a kubelet knows that the machine was started anew.
    for setting, value in {**KERNEL_SETTINGS, "kernel/random/boot_id": str(uuid.uuid4())}.items():
        file = life / setting.replace("/", ".")
        file.write_text(f"{value}\n")
        commands.append(["mount", "--bind", str(file), f"/proc/sys/{setting}"])

    def unit(name: str, *command: str, after: tuple[str, ...]) -> Unit:
        return Unit(name, command, "/", environment, str(log_directory / f"{name}.log"), after)

    ready = (f"unix:{CONTAINERD_SOCKET}", f"{API_URL}/readyz")
    kubelet_flags = [
        f"--config={etc}/kubelet.yaml",
        f"--kubeconfig={etc}/kubelet.kubeconfig",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
    ]
    return Spec(
        setup=commands,
        units=[
            unit("containerd", "containerd", f"--config={etc}/containerd.toml", after=()),
            unit("kubelet", str(binaries.program("kubelet")), *kubelet_flags, after=ready),
            unit("proxy", str(binaries.program("kube-proxy")), f"--config={etc}/proxy.yaml", after=ready),
        ],
    )


def _kubelet(etc: Path, node: Node, cgroup: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{etc}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{etc}/kubelet.crt",
        "tlsPrivateKeyFile": f"{etc}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        # Also where the machine has version 1 only.
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "clusterDNS": [CONTROL_ADDRESS],
        "clusterDomain": DOMAIN,
        # The machine's own name servers are out of reach.
        "resolvConf": "",
        "failSwapOn": False,
        "enforceNodeAllocatable": ["pods"],
        # The nodes share one disk and one memory with all else that runs here.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        # An image that was loaded can't be pulled again.
        "imageGCHighThresholdPercent": 100,
        "registryPullQPS": 0,
        "nodeLeaseDurationSeconds": LEASE_S,
        "nodeStatusUpdateFrequency": "4s",
        "nodeStatusReportFrequency": "1m",
        "kubeAPIQPS": 100,
        "kubeAPIBurst": 200,
    }


def _proxy(etc: Path, node: Node) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{etc}/proxy.kubeconfig"},
        "mode": "nftables",
        "clusterCIDR": POD_NETWORK,
        "hostnameOverride": node.name,
        "bindAddress": node.address,
        # These limits are the whole machine's.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
    }


def _network(node: Node) -> dict[str, object]:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": node.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}


def _containerd(etc: Path, tools: Tools) -> str:
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # Without CAP_SYS_RESOURCE no process may be made less likely to be killed for memory than it was.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{tools.network_plugins}"
    conf_dir = "{etc}/cni"
"""
