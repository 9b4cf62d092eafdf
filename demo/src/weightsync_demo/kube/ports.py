"""A port to listen on."""

import random
import socket

# Below what Linux gives to outgoing connections (from 32768 on) and what Kubernetes gives to Services (from
# 30000 on): while a server is away for a restart, no connection of another process is given its port.
PORTS = range(20000, 30000)
_ATTEMPTS = 100


def choose(host: str) -> int:
    """A TCP port of `host` that is free now; another process may take it before it is used.

    Raises OSError where no port is found.
    """
    for port in random.sample(PORTS, _ATTEMPTS):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"of {_ATTEMPTS} ports tried on {host}, none is free")
