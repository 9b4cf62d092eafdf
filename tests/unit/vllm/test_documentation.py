"""docs/vllm.md names tests, flags and headers that exist."""

import re
from pathlib import Path

from weightsync_engine.guard import labels

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/vllm.md").read_text()


def test_every_test_that_it_names_is_there():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in tests} == set()
    files = set(re.findall(r"`(?:tests/[a-z/]+/)?(test_[a-z0-9_]+\.py)`", PAGE))
    assert {name for name in files if not list((ROOT / "tests").rglob(name))} == set()


def test_headers_are_those_that_are_sent():
    sent = {value for name, value in vars(labels).items() if name.endswith("_HEADER")}
    assert set(re.findall(r"`(x-weightsync-[a-z-]+)`", PAGE)) == sent


def test_the_refusal_of_data_parallelism_is_the_one_that_is_said():
    (said,) = re.findall(r"\*(weightsync updates one [^*]+)\*", PAGE)
    assert said in (ROOT / "engine/src/weightsync_engine/vllm/backend.py").read_text()
