"""Every message there can be comes back as it went; a spoiled one is refused as malformed, never by another error."""

import json
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync_contract import frames
from weightsync_contract.codec import MalformedError, dumps, loads, to_document
from weightsync_contract.fleetview import FleetView
from weightsync_contract.manifest import MAX_DIMENSIONS, Manifest, ManifestError
from weightsync_contract.messages import (
    Desired,
    Hello,
    Nack,
    Observed,
    Refused,
    Released,
    Timeouts,
    Welcome,
)
from weightsync_contract.reasons import PublishCode

SECONDS = st.floats(allow_nan=False, allow_infinity=False)
st.register_type_strategy(Timeouts, st.builds(Timeouts, SECONDS, SECONDS, SECONDS))
st.register_type_strategy(Welcome, st.builds(Welcome, st.integers(), SECONDS, SECONDS))

AGENTS = st.one_of(*(st.from_type(kind) for kind in (Hello, Observed, Nack)))
OPERATORS = st.one_of(*(st.from_type(kind) for kind in (Welcome, Refused, Desired, Released)))
SPOILED = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, float("nan"), float("inf"), "\ud800", "", [], {}, [[]], {"version": {}}]),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    if isinstance(document, dict):
        inner = list(document.items())
    else:
        inner = list(enumerate(document)) if isinstance(document, list) else []
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def spoil(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at one place."""
    if not path:
        return value
    inner = dict(document) if isinstance(document, dict) else list(document)
    inner[path[0]] = spoil(document[path[0]], path[1:], value)
    return inner


@given(AGENTS)
def test_whatever_an_agent_can_say_comes_back(message: Any) -> None:
    assert frames.decode_from_agent(frames.encode(message)) == message


@given(OPERATORS)
def test_whatever_the_operator_can_say_comes_back(message: Any) -> None:
    assert frames.decode_from_operator(frames.encode(message)) == message


@given(st.from_type(FleetView))
def test_whatever_a_fleet_can_be_comes_back(view: FleetView) -> None:
    assert loads(FleetView, dumps(view)) == view


@given(AGENTS | OPERATORS, st.data())
def test_a_message_with_one_wrong_value_is_malformed_or_still_one(message: Any, data: st.DataObject) -> None:
    whole = json.loads(frames.encode(message))
    spoiled = spoil(whole, data.draw(st.sampled_from(places(whole))), data.draw(SPOILED))
    for decode in (frames.decode_from_agent, frames.decode_from_operator):
        try:
            taken = decode(json.dumps(spoiled))
        except MalformedError:
            continue
        assert decode(frames.encode(taken)) == taken


@given(st.text(st.characters(categories=None)) | st.text(st.sampled_from('[]{}",:0e9\\u')))
def test_text_that_is_no_message_is_malformed(text: str) -> None:
    for decode in (frames.decode_from_agent, frames.decode_from_operator):
        with pytest.raises(MalformedError):
            decode(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_seconds_are_finite(number: str) -> None:
    with pytest.raises(MalformedError, match=r"\$\.pingSeconds: expected a finite number"):
        frames.decode_from_operator(
            f'{{"type":"welcome","protocol":1,"pingSeconds":{number},"deadSeconds":1}}'
        )


@given(AGENTS | OPERATORS)
def test_names_on_the_wire_are_camel_case_and_what_is_none_is_left_out(message: Any) -> None:
    def check(value: Any, document: Any) -> None:
        if is_dataclass(value):
            given = {field.name: getattr(value, field.name) for field in fields(value)}
            present = {name: item for name, item in given.items() if item is not None}
            assert len(document) == len(present)
            for (name, item), key in zip(present.items(), document, strict=True):
                assert key.lower() == name.replace("_", "")
                assert "_" not in key
                check(item, document[key])
        elif isinstance(value, tuple):
            for item, inner in zip(value, document, strict=True):
                check(item, inner)

    check(message, to_document(message))


# ------------------------------------------------------------------------------------------------- manifests

CELL = SPOILED | st.sampled_from(["int8", "float32", [2, 3], [1 << 60], [2**40, 2**40], [1] * 70])


@given(st.lists(CELL, max_size=3), st.lists(CELL, max_size=3), st.lists(CELL, max_size=3))
def test_whatever_three_lists_hold_they_are_a_manifest_or_a_manifest_error(
    names: Any, dtypes: Any, shapes: Any
) -> None:
    try:
        manifest = Manifest.from_lists(names, dtypes, shapes)
    except ManifestError:
        return
    assert Manifest.decode(manifest.encode()) == manifest


@given(st.lists(st.lists(CELL, min_size=2, max_size=4), min_size=1, max_size=3))
def test_whatever_rows_hold_they_are_a_manifest_or_a_manifest_error(rows: Any) -> None:
    try:
        manifest = Manifest.decode(json.dumps(rows))
    except ManifestError:
        return
    assert json.loads(manifest.encode()) == rows


@pytest.mark.parametrize(
    ("shape", "code"),
    [
        pytest.param([2**40, 2**40], PublishCode.TOO_LARGE, id="a product"),
        pytest.param([10**400], PublishCode.BAD_SHAPE, id="a size"),
        pytest.param([1] * (MAX_DIMENSIONS + 1), PublishCode.BAD_SHAPE, id="dimensions"),
        pytest.param(None, PublishCode.BAD_SHAPE, id="no list"),
    ],
)
def test_what_no_machine_holds_is_refused(shape: Any, code: PublishCode) -> None:
    with pytest.raises(ManifestError) as refused:
        Manifest.from_lists(["small", "x"], ["int8", "int8"], [[1], shape])
    assert refused.value.code is code
    assert "'x'" in str(refused.value)


def test_nesting_without_end_is_a_manifest_error() -> None:
    with pytest.raises(ManifestError):
        Manifest.decode("[" * 100_000)
