"""What docs/rollouts.md shows is what the API server takes and the operator reads."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.core.actions import parse
from weightsync_operator.core.model import OnFailure, Pause, Pin
from weightsync_operator.core.spec import parse_spec

PAGE = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
DOCUMENTS: list[dict[str, Any]] = [
    yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]

pytestmark = pytest.mark.usefixtures("crds")


@pytest.mark.parametrize("number", range(len(DOCUMENTS)))
def test_a_document_is_taken_and_asks_for_nothing_that_is_not_there(
    apiserver: ApiServer, namespace: str, number: int
) -> None:
    text = yaml.safe_dump(DOCUMENTS[number])
    apiserver.kubectl("apply", "-n", namespace, "--validate=strict", "-f", "-", stdin=text)
    stored = yaml.safe_load(apiserver.kubectl("get", "weightsync", "policy", "-n", namespace, "-o", "yaml"))
    assert parse_spec(stored["spec"]).unsupported == ()


def test_the_documents_say_what_the_page_says() -> None:
    at_once, waves, checks, pinned = (parse_spec(each["spec"]) for each in DOCUMENTS)
    assert at_once.waves == ()
    assert [(each.members, each.pause) for each in waves.waves] == [("1", Pause()), ("50%", Pause(600.0))]
    assert checks.on_failure is OnFailure.ROLLBACK
    first, second = (each.check for each in checks.waves)
    assert first is not None
    assert first.prometheus is not None
    assert (first.prometheus.maximum, first.interval, first.deadline) == (0.01, 15.0, 600.0)
    assert second is not None
    assert second.http is not None
    assert (second.http.path, second.http.equals) == ("verdict.state", "good")
    assert pinned.pin == Pin(41, "run-7")


def test_every_action_that_the_page_shows_has_the_form_that_is_read() -> None:
    shown = re.findall(r"weightsync\.dev/action=(\S+?)[)\s`]", PAGE) + re.findall(
        r"`(\w+@run-7/[^`]+)`", PAGE
    )
    assert len(shown) >= 3
    for each in shown:
        assert parse(each) is not None, each
    verbs = set(re.findall(r"^\| `(\w+)@RUN/V`", PAGE, re.MULTILINE))
    assert verbs == {"promote", "abort", "retry", "rollback"}
