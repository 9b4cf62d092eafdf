"""Dataclasses to JSON and back, checked: a frame has the form that the class says, or is refused by path.

Field names are snake_case here and camelCase on the wire. Unknown fields are ignored (a newer peer may send
more); a field without a default must be there.
"""

import json
import math
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class MalformedError(ValueError):
    """A document that does not have the form it should have; the message starts with the path in it."""


@cache
def camel(name: str) -> str:
    """``world_size`` to ``worldSize``."""
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def to_document(value: Any) -> Any:
    """Turn a dataclass (nested at will) into what ``json.dumps`` takes. ``None`` fields are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((camel(f.name), getattr(value, f.name)) for f in fields(value))
        return {key: to_document(item) for key, item in pairs if item is not None}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple, frozenset)):
        return [to_document(item) for item in value]
    return value


def from_document(cls: type[T], document: Any, path: str = "$") -> T:
    """Build ``cls`` from a parsed JSON document. Raises MalformedError naming the path that is wrong."""
    return _convert(cls, document, path)  # type: ignore[no-any-return]


def dumps(value: Any) -> str:
    """Compact JSON of a dataclass."""
    return json.dumps(to_document(value), separators=(",", ":"))


def loads(cls: type[T], text: str | bytes) -> T:
    """Parse JSON into ``cls``. Raises MalformedError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"$: no JSON: {error}") from error
    return from_document(cls, document)


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _optional(kind, value, path)
    if origin is tuple:
        return _tuple(kind, value, path)
    if is_dataclass(kind):
        return _dataclass(kind, value, path)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            allowed = ", ".join(str(member.value) for member in kind)
            raise MalformedError(f"{path}: {value!r:.80} is none of {allowed}") from None
    if kind is float and type(value) in (int, float):
        return _finite(value, path)
    if kind in (str, int, float, bool):
        if type(value) is not kind:
            raise MalformedError(f"{path}: expected {kind.__name__}, got {type(value).__name__}")
        return value
    raise TypeError(f"{path}: the codec does not know {kind!r}")


def _finite(value: float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise MalformedError(f"{path}: expected a finite number")
    return number


def _optional(kind: Any, value: Any, path: str) -> Any:
    choices = [choice for choice in get_args(kind) if choice is not types.NoneType]
    if value is None:
        return None
    if len(choices) != 1:
        raise TypeError(f"{path}: only 'X | None' is supported, not {kind!r}")
    return _convert(choices[0], value, path)


def _tuple(kind: Any, value: Any, path: str) -> tuple[Any, ...]:
    item, *rest = get_args(kind)
    if rest != [Ellipsis]:
        raise TypeError(f"{path}: only 'tuple[X, ...]' is supported, not {kind!r}")
    if not isinstance(value, list):
        raise MalformedError(f"{path}: expected a list, got {type(value).__name__}")
    return tuple(_convert(item, each, f"{path}[{number}]") for number, each in enumerate(value))


def _dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: expected an object, got {type(value).__name__}")
    hints, given = _hints(kind), {}
    for field in fields(kind):
        key = camel(field.name)
        if key in value and value[key] is not None:
            given[field.name] = _convert(hints[field.name], value[key], f"{path}.{key}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise MalformedError(f"{path}.{key}: missing")
    return kind(**given)
