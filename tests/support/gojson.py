"""JSON as Go's `encoding/json` reads it into a declared struct: some of what Python takes, Go refuses, and vice versa.

A shape is `str`, `int`, `bool`, `Time`, `Map`, a dict of the struct's JSON names to shapes, or a list of one shape.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from shim.protocol import rfc3339

Shape = Any


class Time:
    """Shape of a `time.Time`: an RFC 3339 string."""


class Map:
    """Shape of a `map[string]interface{}`: any object."""


class GoError(Exception):
    """Go's decoder would return an error."""


class _Object(list[tuple[str, Any]]):
    """An object's members in order, repeated names included."""


@dataclass(frozen=True, slots=True)
class _Number:
    """A number's literal; Go decides by its spelling."""

    literal: str


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def decode(raw: bytes, shape: Shape) -> Any:
    """Read `raw` as `json.Unmarshal` does; raises `GoError`. A struct comes as a dict of the fields that were set."""
    try:
        value = json.loads(
            raw.decode("utf-8", "replace"),
            object_pairs_hook=_Object,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise GoError(f"invalid JSON: {error}") from None
    return _read(value, shape, "body")


def _read(value: Any, shape: Shape, where: str) -> Any:
    if value is None:  # null leaves a Go value as it was
        return None
    if isinstance(shape, dict):
        return _struct(value, shape, where)
    if isinstance(shape, list):
        if isinstance(value, _Object) or not isinstance(value, list):
            raise GoError(f"{where}: no array")
        return [_read(item, shape[0], f"{where}[{at}]") for at, item in enumerate(value)]
    if shape is Map and isinstance(value, _Object):
        return _any(value, where)
    return _scalar(value, shape, where)


def _struct(value: Any, shape: dict[str, Shape], where: str) -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise GoError(f"{where}: no object")
    folded = {name.lower(): name for name in shape}
    found: dict[str, Any] = {}
    for key, inner in value:
        name = key if key in shape else folded.get(key.lower())
        if name is None:
            _any(inner, where)
            continue
        read = _read(inner, shape[name], f"{where}.{name}")
        if isinstance(read, dict) and isinstance(found.get(name), dict):
            found[name] |= read
        elif read is not None:
            found[name] = read
    return found


def _any(value: Any, where: str) -> Any:
    if isinstance(value, _Object):
        return {key: _any(inner, where) for key, inner in value}
    if isinstance(value, list):
        return [_any(inner, where) for inner in value]
    if isinstance(value, _Number):
        number = float(value.literal)
        if math.isinf(number):
            raise GoError(f"{where}: a number out of the range of float64")
        return number
    return value


def _scalar(value: Any, shape: Shape, where: str) -> Any:
    if shape is str and isinstance(value, str):
        return value
    if shape is bool and isinstance(value, bool):
        return value
    if shape is Time and rfc3339.parse(value) is not None:
        return value
    if shape is int and isinstance(value, _Number) and value.literal.lstrip("-").isdigit():
        number = int(value.literal) if len(value.literal) < 32 else 2**64
        if -(2**63) <= number < 2**63:
            return number
    raise GoError(f"{where}: no {shape.__name__}")
