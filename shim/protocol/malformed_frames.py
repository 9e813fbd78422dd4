"""Salvage of frames that are not one plain JSON value: several values, or a value that cannot be decoded.

The controller must get a reply to a command that cannot be decoded. That is possible only with the ids in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from shim.core import bounds
from shim.protocol import lenient_json

MAX_VALUES = 1024
"""Values that are read from one frame."""
MAX_BYTES = 524_288
"""Bytes beyond which a frame is only searched for ids: decoding it in Python would block the event loop."""
SKIMMED_CHARS = 131_072
"""Characters from the start of a value in which its ids are searched."""
OUT_OF_RANGE = "a number is beyond what agents can decode"
TOO_DEEP = "the command is nested too deeply"
TOO_MANY = f"the message has more than {bounds.MAX_VALUES} values"
TOO_LARGE = "the message cannot be read, and is too large to find out why"
NO_JSON = "the message is not valid JSON"

_MAX_DIGITS = 309  # of a whole number that may still fit a float64
_LONG = re.compile(r"\d{310}")
_SPACE = re.compile(r"[ \t\r\n\ufeff\x1e\0]*")  # between values: also marks, record separators and padding
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


class Salvaged(NamedTuple):
    """One value of a frame. With a `fault` it is incomplete: numbers are missing, or everything but its scalars."""

    value: Any
    fault: str = ""


def values_of(frame: bytes, fault: str = "") -> Iterator[Salvaged]:
    """Yield the values of a frame, in order. Text that is no JSON raises nothing.

    With a `fault`, which every value then has, nothing but ids is read.
    """
    text = lenient_json.as_characters(frame).decode()
    at = 0
    for _ in range(MAX_VALUES):
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # the pattern also matches the empty string
        if at >= len(text):
            return
        found, end = _read(text, at, fault)
        if found is not None:
            yield found
        if end is None:
            return
        at = end


def _read(text: str, at: int, fault: str) -> tuple[Salvaged | None, int | None]:
    """Return the value that begins at `at` and its end, `None` if the end is unknown."""
    if fault or len(text) > MAX_BYTES:
        return _skim(text, at, fault or TOO_LARGE)
    out_of_range: list[str] = []

    def number(digits: str) -> Any:
        value = int(digits) if len(digits) <= _MAX_DIGITS and digits.lstrip("-").isdigit() else float(digits)
        if value in (float("inf"), float("-inf")):
            out_of_range.append(digits)
            return None
        return value

    def constant(name: str) -> Any:  # NaN and Infinity are no JSON, but Python programs write them
        out_of_range.append(name)

    # `int` is faster than `number`, and safe unless an integer has more digits than a float64 can.
    whole = number if _LONG.search(text) else int
    decoder = json.JSONDecoder(parse_int=whole, parse_float=number, parse_constant=constant)
    try:
        value, end = decoder.raw_decode(text, at)
    except RecursionError:
        return _skim(text, at, TOO_DEEP)
    except ValueError:
        return _skim(text, at, NO_JSON)
    return Salvaged(value, OUT_OF_RANGE if out_of_range else ""), end


def _skim(text: str, at: int, fault: str) -> tuple[Salvaged | None, int | None]:
    """Return the scalars of the object that begins at `at`, and those of its `payload`, without decoding the rest."""
    envelope: dict[str, Any] = {}
    payload: dict[str, Any] = {}
    depth, key, in_payload, end = 0, None, False, None
    for match in _TOKEN.finditer(text, at, min(len(text), at + SKIMMED_CHARS)):
        lexeme = match[0]
        if lexeme in "{[":
            depth += 1
            if depth == 1 and lexeme == "[":
                return None, None
            in_payload = lexeme == "{" and key == "payload" if depth == 2 else in_payload
            key = None
        elif lexeme in "}]":
            depth, key = depth - 1, None
            if depth <= 0:
                end = match.end()
                break
        elif lexeme == ",":
            key = None
        elif lexeme != ":" and (depth == 1 or (depth == 2 and in_payload)):
            if key is None:
                key = _scalar(lexeme)
            else:
                (envelope if depth == 1 else payload)[str(key)] = _scalar(lexeme)
    return (Salvaged({**envelope, "payload": payload}, fault) if envelope else None), end


def _scalar(token: str) -> Any:
    """Return the value of a scalar. A number that is no integer is returned as text, so that an id stays an id."""
    try:
        value = json.loads(token)
    except (ValueError, RecursionError):
        return token
    return token if isinstance(value, float) else value
