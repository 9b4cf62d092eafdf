"""``python -m weightsync_demo``: the whole of weightsync on one machine, from kubectl apply to tokens."""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from weightsync_demo.kube.errors import KubeError
from weightsync_demo.stage import Options, story
from weightsync_demo.view import LiveView, PlainView, View

DESCRIPTION = """\
Shows the operator keep real inference servers on a real trainer's weights, on this machine alone.

It runs a real Kubernetes API server, the operator, a trainer that really trains, and inference servers with
their agents (a supervisor of the demo's own stands in for the kubelet). It applies examples/weightsync.yaml,
publishes three versions, kills one server while it receives the second, lets a third server join late, and
compares every server's greedy completion with the one computed from the trainer's own weights.
"""
EXAMPLES = """\
examples (with make: make demo ARGS="--engine reference"):
  python -m weightsync_demo                       real vLLM on the CPU, a live table on a terminal
  python -m weightsync_demo --engine reference    a small torch server that speaks vLLM's routes
  python -m weightsync_demo --json                one JSON object as the last line, for scripts
  python -m weightsync_demo --dir /tmp/demo       keep logs, model and the API server's state there

exit status: 0 when every member serves the last version with the trainer's tokens, 1 when not, 2 for usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    view: View = PlainView() if options.json or not sys.stderr.isatty() else LiveView()
    with ExitStack() as stack:
        directory = options.dir
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightsync-demo-")))
        directory.mkdir(parents=True, exist_ok=True)
        chosen = Options(
            options.engine, directory.resolve(), options.limit_rate, options.kubeconfig, options.context
        )
        result = _play(chosen, view)
    if options.json:
        print(json.dumps(result), flush=True)
    else:
        _summary(result)
    return 0 if result["ok"] else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m weightsync_demo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--engine", choices=("vllm", "reference"), default="vllm", help="what serves (default: vllm)"
    )
    parser.add_argument(
        "--json", action="store_true", help="progress on standard error, the result as JSON on output"
    )
    parser.add_argument(
        "--dir", type=Path, metavar="D", help="keep everything in D (default: a temporary directory)"
    )
    parser.add_argument(
        "--limit-rate",
        default="24MiB",
        metavar="BYTES",
        help="bytes a second of a transfer; loopback is so fast that one could not watch it (default: 24MiB)",
    )
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="F",
        help="play on that cluster's API server, in a namespace of its own, instead of starting one; "
        "KUBECONFIG is not looked at",
    )
    parser.add_argument("--context", metavar="C", help="context in --kubeconfig")
    options = parser.parse_args(arguments)
    if options.context and not options.kubeconfig:
        parser.error("--context needs --kubeconfig")
    return options


def _play(options: Options, view: View) -> dict[str, Any]:
    began = time.monotonic()
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"ok": False, "versions": [], "members": [], "seconds": seconds}
    result.update(engine=options.engine, limit_rate=options.limit_rate)
    try:
        with view, story(options, view, seconds) as (played, first, late):
            try:
                played.play(first, late)
            finally:
                played.stop()
                result["versions"] = sorted({row["version"] for row in played.versions})
                result["completions"] = played.versions
                result["traffic"] = played.traffic()
            result["members"] = played.members()
            last = result["versions"][-1]
            equal = all(m["version"] == last and m["tokens_equal"] for m in result["members"])
            rows = all(a["tokens_equal"] for v in played.versions for a in v["answers"])
            result["ok"] = equal and rows and not result["traffic"]["wrong"]
    except (KubeError, TimeoutError, RuntimeError, OSError) as error:
        result["error"] = str(error)
        print(f"error: {error}", file=sys.stderr)
        print(f"logs are below {options.directory} (keep them with --dir)", file=sys.stderr)
    seconds["total"] = round(time.monotonic() - began, 2)
    return result


def _summary(result: dict[str, Any]) -> None:
    for row in result.get("completions", []):
        print(f"\n{row['step']}: version {row['version']}, the trainer's weights answer {row['expected']!r}")
        for answer in row["answers"]:
            print(
                f"  {answer['name']:<8} {answer['text']!r} "
                f"{'equal' if answer['tokens_equal'] else 'NOT EQUAL'}"
            )
    traffic = result.get("traffic")
    if traffic:
        print(
            f"\nsteady requests meanwhile: {traffic['right']} answered by exactly the version they named, "
            f"{traffic['across_a_commit']} across a commit, {traffic['refused']} refused, "
            f"{len(traffic['wrong'])} wrong"
        )
    print(f"seconds: {json.dumps(result['seconds'])}")
    print("ok: every member serves the last version with the trainer's tokens" if result["ok"] else "NOT ok")


if __name__ == "__main__":
    sys.exit(main())
