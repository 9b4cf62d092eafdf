"""What a trainer imports: ``publish(model.state_dict(), version)``.

Standard library and the contract package only, whatever the trainer pins beside it. Tensors are torch tensors (on
any device) and numpy arrays; they may be changed again once publish returns. Every thread may call it; it waits no
longer than it is told to and leaves no thread behind.
"""

import ctypes
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weightsync_contract.codec import MalformedError, to_document
from weightsync_contract.manifest import DTYPE_BYTES, Manifest, ManifestError
from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import PublishCode
from weightsync_engine.publish.channel import ChannelClosedError, Deadline
from weightsync_engine.publish.connection import Pieces, Progress, copy_over, process_token, wait_for
from weightsync_engine.publish.device import FromDevice
from weightsync_engine.publish.protocol import (
    DEFAULT_DIRECTORY,
    SOCKET_NAME,
    Description,
    PublishOutcome,
    checked_version,
)
from weightsync_engine.publish.safetensors import read_file

__all__ = [
    "AgentUnavailableError",
    "PublishCode",
    "PublishError",
    "PublishOutcome",
    "PublishRefusedError",
    "PublishResult",
    "PublishTimeoutError",
    "default_run",
    "publish",
    "publish_file",
]

Tensors = Mapping[str, Any] | Iterable[tuple[str, Any]]
_BASE_SECONDS: Final = 60.0
_BYTES_A_SECOND: Final = 50e6
"""Slowest copy that the default deadline allows for."""


class PublishError(Exception):
    """A version was not published. Training can go on; the fleet serves on with what it has."""


class PublishRefusedError(PublishError):
    """The version can't be published as it is; ``code`` says why, the message what to do. Nothing has changed."""

    def __init__(self, code: PublishCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class PublishTimeoutError(PublishError):
    """The agent did not say in time that it has the version (it may). Trying again with the same bytes is right."""


class AgentUnavailableError(PublishError):
    """There is no agent at the socket, or it went away. Trying again with the same bytes is right."""


@dataclass(frozen=True)
class PublishResult:
    """A version that the agent holds a copy of, and what became of it as far as was waited for."""

    version: VersionId
    digest: str
    outcome: PublishOutcome
    reason: str = ""
    message: str = ""


def default_run() -> str:
    """This process's run: random, and another one in a process that was forked."""
    return process_token()


def publish(
    tensors: Tensors,
    version: int,
    *,
    run: str | None = None,
    wait: bool = False,
    timeout: float | None = None,
    socket: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PublishResult:
    """Hand a version to the pod's agent, under names as the inference engine's checkpoints have them.

    ``tensors``: a mapping or (name, tensor) pairs, as ``state_dict()`` and ``named_parameters()`` give them.
    ``version``: a whole number that grows within ``run`` (default: this process). ``wait``: return once the
    fleet serves it, or it is known that it won't; at the deadline the outcome is PENDING. ``timeout``: seconds for
    all of it (default: 60, and one for each 50 MB). ``progress(bytes, total)`` is called while bytes are copied.

    Raises PublishRefusedError, PublishTimeoutError, AgentUnavailableError (all PublishError: training can go on);
    TypeError for what is no whole tensor of this process.
    """
    pairs = _pairs(tensors)
    names = tuple(name for name, _ in pairs)
    dtypes = tuple(_dtype(tensor) for _, tensor in pairs)
    shapes = tuple(tuple(int(size) for size in tensor.shape) for _, tensor in pairs)
    description = Description(names, dtypes, shapes)
    device = FromDevice()

    def pieces(index: int) -> Iterable[memoryview]:
        tensor = pairs[index][1]
        if hasattr(tensor, "data_ptr") and tensor.device.type == "cuda":
            return device.pieces(tensor.detach().resolve_conj().resolve_neg())
        return (_bytes(tensor),)

    return _publish(description, pieces, version, run, wait, timeout, socket, progress)


def publish_file(
    path: str | os.PathLike[str],
    version: int,
    *,
    run: str | None = None,
    wait: bool = False,
    timeout: float | None = None,
    socket: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PublishResult:
    """The same for a safetensors file, from any framework. A malformed file is refused with BAD_FILE."""
    try:
        with read_file(Path(path)) as file:
            return _publish(file.description, file.tensor, version, run, wait, timeout, socket, progress)
    except ManifestError as error:
        raise PublishRefusedError(error.code, str(error)) from error


def _publish(
    description: Description,
    pieces: Pieces,
    version: int,
    run: str | None,
    wait: bool,
    timeout: float | None,
    socket: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> PublishResult:
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout {timeout}: give seconds, more than 0")
    try:
        identity = checked_version(default_run() if run is None else run, _whole(version))
        manifest = Manifest.from_lists(description.names, description.dtype_names, description.shapes)
    except ManifestError as error:
        raise PublishRefusedError(error.code, str(error)) from error
    data = json.dumps(to_document(description), separators=(",", ":")).encode()
    path = _socket_path(socket)
    seconds = _BASE_SECONDS + manifest.nbytes / _BYTES_A_SECOND if timeout is None else timeout
    deadline = Deadline(seconds)
    try:
        digest = copy_over(path, identity, manifest, data, pieces, deadline, progress)
    except ManifestError as error:
        raise PublishRefusedError(error.code, str(error)) from error
    except TimeoutError as error:
        raise PublishTimeoutError(
            f"{identity} was not taken within {seconds:.0f} s: {error}. Is the agent at {path} overloaded? "
            "Give a longer timeout, or try again"
        ) from error
    except (ChannelClosedError, OSError, MalformedError) as error:
        raise AgentUnavailableError(
            f"no agent took {identity} at {path}: {error}. Check that the pod has the weightsync agent with "
            "--role trainer, and that both containers mount the same directory (WEIGHTSYNC_DIR) and run as the "
            "same user"
        ) from error
    if not wait:
        return PublishResult(identity, digest, PublishOutcome.PUBLISHED)
    settled = wait_for(path, identity, deadline)
    return PublishResult(identity, digest, settled.outcome, settled.reason, settled.message)


def _socket_path(given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    return Path(os.environ.get("WEIGHTSYNC_DIR") or DEFAULT_DIRECTORY) / SOCKET_NAME


def _whole(version: Any) -> Any:
    """Whole numbers of other libraries as Python's; anything else as it is, to be refused by name."""
    if isinstance(version, bool):
        return version
    try:
        return operator.index(version)
    except TypeError:
        return version


def _pairs(tensors: Tensors) -> list[tuple[str, Any]]:
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    try:
        pairs = [(name, tensor) for name, tensor in items]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"give a mapping or (name, tensor) pairs, state_dict() for example: {error}"
        ) from error
    for name, tensor in pairs:
        _check(name, tensor)
    return pairs


def _check(name: object, tensor: Any) -> None:
    """Raises TypeError for what has no elements at an address of this process's memory, or not all of them."""
    if not isinstance(name, str):
        raise TypeError(f"{name!r:.80} is no name of a tensor: give text")
    if not hasattr(tensor, "dtype") or not (hasattr(tensor, "data_ptr") or hasattr(tensor, "ctypes")):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}: give a torch tensor or a numpy array")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name!r} is sharded over processes: call full_tensor() on all of them, publish from one"
        )
    if hasattr(tensor, "data_ptr"):
        if tensor.device.type == "meta":
            raise TypeError(f"{name!r} is on the meta device: it has no bytes")
        if str(tensor.layout) != "torch.strided":
            raise TypeError(f"{name!r} has the layout {tensor.layout}: call to_dense()")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Any) -> memoryview:
    """The elements of one tensor in C order, in host memory; a copy only where they are not there already."""
    if hasattr(tensor, "data_ptr"):
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.device.type != "cpu":
            tensor = tensor.cpu()
        tensor = tensor.contiguous()
        address = tensor.data_ptr()
    else:
        tensor = tensor if tensor.flags.c_contiguous else tensor.copy(order="C")
        address = tensor.__array_interface__["data"][0]
    nbytes = math.prod(tensor.shape) * DTYPE_BYTES[_dtype(tensor)]
    if not nbytes:
        return memoryview(b"")
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    # The array would not keep the tensor alive by itself.
    memory._weightsync_owner = tensor
    return memoryview(memory).cast("B")
