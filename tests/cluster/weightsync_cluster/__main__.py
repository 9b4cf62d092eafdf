"""`python -m weightsync_cluster up` and `down`: a cluster of two nodes to try things on."""

import argparse
import sys
from collections.abc import Sequence

from weightsync_cluster.cluster import Cluster
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.place import Place
from weightsync_demo.kube.build import ensure_binaries
from weightsync_demo.kube.errors import KubeError

DESCRIPTION = """\
A real Kubernetes cluster of two nodes on this machine, each node and the control plane in namespaces of its
own. The first start builds Kubernetes (some minutes, see `make apiserver`) and downloads containerd and runc
(40 MB); any later one takes some ten seconds. It needs Linux, root, and the packages of Debian or Ubuntu; it
installs nothing, and leaves the machine's network and settings as they are.
"""
# Tests make clusters of other names.
NAME = "dev"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weightsync_cluster",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("up", "down"), help="start the cluster, or remove all of it")
    parser.add_argument("--name", default=NAME, help="clusters of different names can run side by side")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "up":
            _up(options.name)
        else:
            _down(options.name)
    except (ClusterError, KubeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _up(name: str) -> None:
    cluster = Cluster(name, ensure_binaries(_say), _say)
    cluster.up()
    _say(f"export KUBECONFIG={cluster.kubeconfig}")
    _say(f"alias kubectl={cluster.kubectl_program}")


def _down(name: str) -> None:
    place = Place(name)
    with place.alone(_say):
        place.clear()


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
