"""What a version can be made of."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync_contract.manifest import (
    DTYPE_BYTES,
    MAX_NAME_BYTES,
    Manifest,
    ManifestError,
    TensorSpec,
    aligned,
)
from weightsync_contract.names import TENSOR_ALIGNMENT
from weightsync_contract.reasons import PublishCode

SPECS = st.builds(
    TensorSpec,
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(0, 50), max_size=4).map(tuple),
)


@given(st.lists(SPECS, min_size=1, max_size=12, unique_by=lambda spec: spec.name))
def test_tensors_lie_one_behind_the_other_aligned_and_come_back(specs: list[TensorSpec]) -> None:
    manifest = Manifest(tuple(specs))
    at = 0
    for spec, offset in zip(manifest.tensors, manifest.offsets, strict=True):
        assert offset == at
        assert offset % TENSOR_ALIGNMENT == 0
        at = offset + aligned(spec.nbytes)
    assert manifest.nbytes == at
    again = Manifest.decode(manifest.encode())
    assert again == manifest
    assert again.layout == manifest.layout


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((["b", "a"], ["int8", "int8"], [[1], [1]]), id="order"),
        pytest.param((["a", "c"], ["int8", "int8"], [[1], [1]]), id="name"),
        pytest.param((["a", "b"], ["int8", "uint8"], [[1], [1]]), id="dtype"),
        pytest.param((["a", "b"], ["int8", "int8"], [[1], [1, 1]]), id="shape"),
        pytest.param((["a"], ["int8"], [[1]]), id="fewer"),
    ],
)
def test_any_difference_is_another_layout(other: Any) -> None:
    one = Manifest.from_lists(["a", "b"], ["int8", "int8"], [[1], [1]])
    assert Manifest.from_lists(*other).layout != one.layout


@pytest.mark.parametrize(
    ("lists", "code", "message"),
    [
        (
            (["a", "b"], ["int8"], [[1], [1]]),
            PublishCode.UNEQUAL_LENGTHS,
            "dtype_names has 1 entries but names has 2",
        ),
        ((["a"], ["int8"], []), PublishCode.UNEQUAL_LENGTHS, "shapes has 0 entries"),
        (([], [], []), PublishCode.EMPTY, "no tensor"),
        ((["a", "a"], ["int8", "int8"], [[1], [1]]), PublishCode.DUPLICATE_NAME, "'a' is there twice"),
        ((["a"], ["complex64"], [[1]]), PublishCode.UNKNOWN_DTYPE, "publish it as one of"),
        ((["a"], ["int8"], [[-1]]), PublishCode.BAD_SHAPE, r"shape \[-1\]"),
        ((["a"], ["int8"], [[1.0]]), PublishCode.BAD_SHAPE, "whole numbers"),
        ((["a"], ["int8"], [[True]]), PublishCode.BAD_SHAPE, "whole numbers"),
        ((["line\nbreak"], ["int8"], [[1]]), PublishCode.BAD_NAME, "printable"),
        ((["\ud800"], ["int8"], [[1]]), PublishCode.BAD_NAME, "printable"),
        ((["x" * (MAX_NAME_BYTES + 1)], ["int8"], [[1]]), PublishCode.BAD_NAME, "1 to 1024 bytes"),
    ],
)
def test_what_no_version_can_have_is_refused_by_code(lists: Any, code: PublishCode, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as refused:
        Manifest.from_lists(*lists)
    assert refused.value.code is code


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_nonsense_is_a_manifest_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.decode(data)


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4))
)
def test_any_other_document_is_a_manifest_error(document: Any) -> None:
    try:
        manifest = Manifest.decode(json.dumps(document))
    except ManifestError:
        return
    assert json.loads(manifest.encode()) == document
