"""Who has which address. All of them exist in the cluster's own network namespaces only."""

from dataclasses import dataclass

CONTROL = "control"
CONTROL_ADDRESS = "10.99.0.1"
API_PORT = 6443
API_URL = f"https://{CONTROL_ADDRESS}:{API_PORT}"
PREFIX_LENGTH = 24
POD_NETWORK = "10.244.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
# The Service `kubernetes` takes the first address of its network.
API_SERVICE_ADDRESS = "10.96.0.1"
DOMAIN = "cluster.local"


@dataclass(frozen=True)
class Node:
    """The `number`th node, from 1 on."""

    number: int

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"10.99.0.{10 + self.number}"

    @property
    def hardware_address(self) -> str:
        """The same in each life of the node: its peers remember it for longer than a restart takes."""
        return f"02:00:0a:63:00:{10 + self.number:02x}"

    @property
    def pods(self) -> str:
        """The network of its pods."""
        return f"10.244.{self.number}.0/24"
