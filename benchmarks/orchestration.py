"""How long the operator takes for a rollout, transfer and load left out: publish to all members serving.

    .venv/bin/python benchmarks/orchestration.py [--members 4] [--rollouts 30] [--write]

A real API server, the operator's real process and its real sessions; the agents are fakes that answer at
once. One JSON object goes to standard output; ``--write`` also puts it under benchmarks/results/. What one
write of a status takes at the same API server in the same run is measured beside it: that is the floor,
since what is persisted comes before what is sent.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from cluster_objects import ClusterObjects  # noqa: E402
from kubernetes import client, config  # noqa: E402
from operated import operated, row  # noqa: E402

from weightsync_demo.kube.apiserver import run_apiserver  # noqa: E402
from weightsync_demo.kube.build import ensure_binaries  # noqa: E402
from weightsync_demo.kube.crd import apply_crds  # noqa: E402

NAMESPACE = "benchmark"


async def measure(
    objects: ClusterObjects, kubeconfig: Path, directory: Path, members: int, rollouts: int
) -> Any:
    """Milliseconds of each rollout, the first (which needs a group) apart."""
    await asyncio.to_thread(objects.weightsync)
    async with operated(objects, kubeconfig, directory) as world:
        operator = await world.start()
        trainer = await world.trainer()
        agents = await world.members(members)
        for each in (trainer, *agents):
            await each.until(lambda agent: agent.desired is not None)
        took = []
        for number in range(1, rollouts + 2):
            started = time.perf_counter()
            version = trainer.publish(number)
            await asyncio.gather(*(each.until_serving(version) for each in agents))
            took.append((time.perf_counter() - started) * 1000)
            await world.until_status(
                lambda s, n=number: s["current"]["version"] == n and row(s, "Ready")["reason"] == "Synced"
            )
        rss = operator.rss_mib()
        await asyncio.to_thread(operator.stop)
    return took, rss


def status_writes(objects: ClusterObjects, count: int) -> list[float]:
    """Milliseconds of each of ``count`` small writes of a status."""
    took = []
    for number in range(count):
        started = time.perf_counter()
        objects.patch_status({"synced": f"{number}/0"})
        took.append((time.perf_counter() - started) * 1000)
    return took


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[int(len(ordered) * 0.95)], 1),
        "least": round(ordered[0], 1),
        "most": round(ordered[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/ too")
    given = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with run_apiserver(directory / "api", ensure_binaries(say)) as server:
            apply_crds(server)
            configuration = client.Configuration()
            config.load_kube_config(str(server.kubeconfig), client_configuration=configuration)
            configuration.proxy = None
            with client.ApiClient(configuration) as api_client:
                objects = ClusterObjects(api_client, NAMESPACE)
                objects.core.create_namespace({"metadata": {"name": NAMESPACE}})
                objects.core.create_namespaced_service_account(NAMESPACE, {"metadata": {"name": "default"}})
                took, rss = asyncio.run(
                    measure(objects, server.kubeconfig, directory, given.members, given.rollouts)
                )
                writes = status_writes(objects, 50)
    result = {
        "benchmark": "orchestration",
        "members": given.members,
        "rollouts": given.rollouts,
        "milliseconds": {
            "first, with a new group": round(took[0], 1),
            "publish to all serving": summary(took[1:]),
            "one status write": summary(writes),
        },
        "in status writes": round(statistics.median(took[1:]) / statistics.median(writes), 2),
        "operator_rss_mib": round(rss, 1),
        "raw_ms": [round(each, 1) for each in took],
        "load_average": os.getloadavg()[0],
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    }
    print(json.dumps(result))
    if given.write:
        path = ROOT / "benchmarks" / "results" / "orchestration.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
