"""`python -m weightsync_demo.kube`: an API server to look at, to try things on, or to run tests against."""

import argparse
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from weightsync_demo.kube.apiserver import run_apiserver
from weightsync_demo.kube.build import ensure_binaries
from weightsync_demo.kube.crd import apply_crds
from weightsync_demo.kube.errors import KubeError

DESCRIPTION = """\
Run a real Kubernetes API server on 127.0.0.1 until Ctrl-C.

The first run on a machine builds it from source, which takes some minutes on two cores and some 4 GB of
disk for as long; after that it starts in a few seconds. It needs Python and a way to the Go module proxy,
no container runtime and no rights. No kubelet, scheduler or controller-manager runs beside it: pods are
accepted and stay Pending.
"""
EXAMPLES = """\
examples:
  python -m weightsync_demo.kube                     objects are gone when it ends
  python -m weightsync_demo.kube --dir ~/ws-state    objects, port and kubeconfig are kept for the next run
  python -m weightsync_demo.kube --crds              with weightsync's custom resources applied
  python -m weightsync_demo.kube --build-only        only make sure that the binary is there
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weightsync_demo.kube",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dir", type=Path, metavar="D", help="keep the state in D (default: a temporary folder)"
    )
    parser.add_argument(
        "--crds", action="store_true", help="apply the custom resource definitions of this checkout"
    )
    parser.add_argument("--build-only", action="store_true", help="build the binary if need be, and end")
    options = parser.parse_args(arguments)
    try:
        _run(options.dir, crds=options.crds, build_only=options.build_only)
    except (KubeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(directory: Path | None, *, crds: bool, build_only: bool) -> None:
    binaries = ensure_binaries(_say)
    if build_only:
        _say(f"binaries are in {binaries.hyper.parent}")
        return
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightsync-kube-")))
        server = stack.enter_context(run_apiserver(directory, binaries))
        if crds:
            apply_crds(server)
        _say(f"the API server is ready at {server.url}, its log is {server.log}; Ctrl-C ends it")
        _say(f"export KUBECONFIG={server.kubeconfig}")
        _say(f"alias kubectl={binaries.kubectl}")
        while not ended.wait(0.5):
            if not server.running:
                raise KubeError(f"the API server ended by itself: see {server.log}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
