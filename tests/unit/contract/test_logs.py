"""Every record is one line, in either form, with its fields."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from weightsync_contract import logs


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def written(form: str, root: logging.Logger) -> str:
    stream = io.StringIO()
    logs.configure(form, stream=stream)
    logs.get("weightsync.test").info("session opened", pod="default/p 1", seconds=0.5, time="mine", empty="")
    logging.getLogger("other").warning("two\nlines of %s", "theirs")
    return stream.getvalue()


def test_json_is_one_object_a_line_and_fields_never_hide_what_the_line_is(root: logging.Logger) -> None:
    ours, theirs = map(json.loads, written("json", root).splitlines())
    assert (ours["event"], ours["level"], ours["logger"]) == ("session opened", "info", "weightsync.test")
    assert (ours["pod"], ours["seconds"]) == ("default/p 1", 0.5)
    assert ours["time"] != "mine"
    assert (theirs["event"], theirs["level"]) == ("two\nlines of theirs", "warning")


def test_text_is_one_line_an_event_with_quoted_values(root: logging.Logger) -> None:
    ours, theirs = written("text", root).splitlines()
    assert ours.endswith('info    session opened pod="default/p 1" seconds=0.5 time=mine empty=""')
    assert theirs.endswith("warning two\\nlines of theirs")


def test_a_traceback_follows_its_event(root: logging.Logger) -> None:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logs.get("weightsync.test").exception("reconcile failed")
    assert "RuntimeError: broken" in json.loads(stream.getvalue())["traceback"]


def test_an_unknown_form_is_refused(root: logging.Logger) -> None:
    with pytest.raises(ValueError, match="none of json, text"):
        logs.configure("xml")
