"""The wires between machines, and cutting them. All of it is in the machines' own network namespaces."""

import ipaddress
from collections.abc import Iterable, Sequence

from weightsync_cluster.addresses import CONTROL_ADDRESS, PREFIX_LENGTH, Node
from weightsync_cluster.machine import Machine
from weightsync_cluster.shell import run

BRIDGE = "machines"
TABLE = "weightsync_partition"
# Where packets arrive. Dropped where they leave, a sender would be told.
HOOKS = ("forward", "input")


def _ip(machine: Machine, lines: Sequence[str]) -> None:
    run([*machine.entering("--net"), "ip", "-batch", "-"], stdin="".join(f"{line}\n" for line in lines))


def prepare(control: Machine, nodes: Iterable[Node]) -> None:
    """Make the bridge that nodes are plugged into, on the control plane's machine."""
    lines = [
        "link set lo up",
        f"link add {BRIDGE} type bridge",
        f"addr add {CONTROL_ADDRESS}/{PREFIX_LENGTH} dev {BRIDGE}",
        f"link set {BRIDGE} up",
    ]
    lines += [f"route add {node.pods} via {node.address}" for node in nodes]
    _ip(control, lines)


def plug(control: Machine, machine: Machine, node: Node, others: Iterable[Node]) -> None:
    """Join `machine`, the machine of `node`, to the bridge."""
    near = f"to-{node.name}"
    far = f"eth0 address {node.hardware_address} netns {machine.running_pid}"
    _ip(control, [f"link add {near} type veth peer name {far}", f"link set {near} master {BRIDGE} up"])
    lines = [
        "link set lo up",
        f"addr add {node.address}/{PREFIX_LENGTH} dev eth0",
        "link set eth0 up",
        f"route add default via {CONTROL_ADDRESS}",
    ]
    lines += [f"route add {other.pods} via {other.address}" for other in others]
    _ip(machine, lines)


Cut = tuple[frozenset[str], frozenset[str]]


def rules(cuts: Iterable[Cut]) -> str:
    """What nft reads to drop every packet between the two sides of each cut, and none besides.

    Addresses are those after a Service's address was replaced, and connections that are there already are
    cut too.
    """
    drops = [
        f"ip saddr {{ {_elements(here)} }} ip daddr {{ {_elements(there)} }} drop"
        for one, other in cuts
        for here, there in ((one, other), (other, one))
    ]
    # Deleting what isn't there is an error, so it is made first.
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for hook in HOOKS:
        lines += [f"chain {hook} {{", f"type filter hook {hook} priority -200; policy accept;", *drops, "}"]
    return "\n".join([*lines, "}", ""])


def cut(machine: Machine, cuts: Iterable[Cut], environment: dict[str, str]) -> None:
    """Make the cuts on `machine`, in the place of those that were made there before."""
    command = [*machine.entering("--net"), "nft", "--file", "-"]
    run(command, stdin=rules(cuts), environment=environment)


def _elements(addresses: Iterable[str]) -> str:
    """As a set of nft; raises ValueError where one is no address and no network."""
    return ", ".join(sorted(str(ipaddress.ip_network(address)) for address in addresses))
