"""A long search: many seeds on all cores, with a progress bar; what was found is written as JSON.

``make soak`` plays 100,000 random lives of a fleet. ARGS="--seeds 2000 --first 500000" plays others, --write keeps
the result in benchmarks/results/soak.json. Exit code 1 if a seed failed; each one is printed with its replay.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from simulated_fleet import Simulation  # noqa: E402

RESULT: Final = ROOT / "benchmarks" / "results" / "soak.json"
BLOCK: Final = 50
FAILURES_KEPT: Final = 20
SEEN: Final = {
    "rollouts that ended well": "event Complete:",
    "members left out": "event Excluded:",
    "canaries paused": "event CanaryPaused:",
    "canaries lost": "event CanaryLost:",
    "checks failed": "event CheckFailed:",
    "actions done": "event Accepted:",
    "actions refused as stale": "event Stale:",
    "rollouts aborted": "event Aborted:",
    "operators killed": "operator dies",
    "engines killed": "engine dies",
    "agents killed": "agent dies",
    "children killed or hung": "child ",
    "sessions cut off": "cut off for",
    "statuses wiped": "status is wiped",
}
"""What happened, by what the history says of it: a search in which nothing happens shows nothing."""


def play(first: int, count: int) -> dict[str, Any]:
    """Some seeds in one process."""
    seen: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []
    hours = 0.0
    for seed in range(first, first + count):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception as error:
            failed.append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:2000]})
        hours += (simulation.clock.now - 1000.0) / 3600
        for line in simulation.history.log:
            for name, text in SEEN.items():
                seen[name] += text in line
    return {"seeds": count, "failed": failed, "seen": dict(seen), "hours": hours}


def search(first: int, seeds: int, workers: int) -> dict[str, Any]:
    """All of them; progress goes to stderr."""
    began, done, hours = time.monotonic(), 0, 0.0
    seen: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers) as pool:
        blocks = [
            pool.submit(play, at, min(BLOCK, first + seeds - at)) for at in range(first, first + seeds, BLOCK)
        ]
        for block in as_completed(blocks):
            found = block.result()
            done += found["seeds"]
            hours += found["hours"]
            seen.update(found["seen"])
            for each in found["failed"]:
                failed.append(each)
                _say_failure(each)
            _bar(done, seeds, len(failed), time.monotonic() - began)
    sys.stderr.write("\n")
    return {
        "seeds": [first, first + seeds - 1],
        "failed": sorted(failed, key=lambda each: each["seed"])[:FAILURES_KEPT],
        "failures": len(failed),
        "seen": {name: seen[name] for name in SEEN},
        "simulated_hours": round(hours, 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "workers": workers,
    }


def _say_failure(failure: dict[str, Any]) -> None:
    sys.stderr.write("\r\033[K")
    print(f"seed {failure['seed']}: {failure['error']}")
    print(
        f"to see it again: WEIGHTSYNC_SEED={failure['seed']} python -m pytest tests/simulation -k replay -s"
    )


def _bar(done: int, seeds: int, failures: int, seconds: float) -> None:
    full = 40 * done // seeds
    left = seconds / done * (seeds - done) if done else 0.0
    bar = "#" * full + "." * (40 - full)
    sys.stderr.write(f"\r[{bar}] {done}/{seeds} seeds, {failures} failed, {left / 60:.0f} min left ")
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    os.nice(19)
    result = search(arguments.first, arguments.seeds, arguments.workers)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    document = {"when": now, "python": platform.python_version(), **result}
    print(json.dumps(document, indent=2))
    if arguments.write:
        RESULT.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
