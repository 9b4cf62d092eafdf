"""Files that other frameworks wrote, and files that nobody should have written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsync_contract.manifest import ManifestError
from weightsync_contract.reasons import PublishCode
from weightsync_engine.publish.safetensors import read_file


def test_a_file_of_the_library_is_read_whole(tmp_path: Path) -> None:
    tensors = {
        "z": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "a": torch.randn(5).to(torch.bfloat16),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "bits": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with read_file(tmp_path / "x.safetensors") as file:
        names = file.description.names
        assert set(names) == set(tensors)
        for index, name in enumerate(names):
            expected = tensors[name]
            assert file.description.dtype_names[index] == str(expected.dtype).removeprefix("torch.")
            assert file.description.shapes[index] == tuple(expected.shape)
            raw = (
                expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                if expected.numel()
                else b""
            )
            assert b"".join(bytes(piece) for piece in file.tensor(index)) == raw


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param({"x": entry(dtype="F99")}, "dtype 'F99'", id="unknown dtype"),
        pytest.param({"x": entry(shape=[3])}, "is to be 12 bytes", id="shape and bytes differ"),
        pytest.param({"x": entry(data_offsets=[0, 99999])}, "is to be 8 bytes", id="past the end"),
        pytest.param({"x": entry(data_offsets=[8, 0])}, "is to be 8 bytes", id="backwards"),
        pytest.param({"x": entry(shape=[-2])}, "shape", id="negative"),
        pytest.param({"x": entry(shape="2")}, "is described as", id="no shape"),
        pytest.param({"x": 7}, "is described as", id="no description"),
        pytest.param({"x": entry(), "y": entry(data_offsets=[4, 12])}, "overlaps", id="overlap"),
        pytest.param([], "no JSON object", id="a list"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ManifestError, match=message) as refused, read_file(path):
        pass
    assert refused.value.code is PublishCode.BAD_FILE


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"1234567", id="shorter than a length"),
        pytest.param((1 << 40).to_bytes(8, "little") + b"{}", id="a header larger than the file"),
        pytest.param((2).to_bytes(8, "little") + b"{]", id="no JSON"),
        pytest.param((2).to_bytes(8, "little") + b"\xff\xff", id="no text"),
        pytest.param((9000).to_bytes(8, "little") + b"[" * 9000, id="nesting"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as refused, read_file(path):
        pass
    assert refused.value.code is PublishCode.BAD_FILE
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.safetensors"), read_file(tmp_path / "none.safetensors"):
        pass


def test_a_name_twice_is_said_so(tmp_path: Path) -> None:
    """The JSON parser would take the last one."""
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1")
    with pytest.raises(ManifestError, match="a name is there twice"), read_file(path):
        pass
