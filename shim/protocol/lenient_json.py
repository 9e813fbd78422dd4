r"""JSON decoder that is as lenient as Go's: bytes that are no character become U+FFFD.

RFC 8259 leaves open how to decode an unpaired surrogate such as `\ud83d`, and bytes that are no UTF-8. Programs do send
both: a JavaScript text that was cut inside a character, or the output of a command in Latin-1. No command and no result
may be lost because of it.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable
from typing import Any

import msgspec

from shim.core.bounds import FREE_VALUES, MAX_VALUES, VALUE_BYTES
from shim.errors import AgentError


def to_float(digits: str) -> float:
    """Return a number that is no integer, for msgspec's `float_hook`. Raises `ValueError` beyond a float64.

    msgspec's own conversion of `1e300` takes thousands of times longer than that of `1.5`: a body of 1 MiB would hold
    the event loop for seconds.
    """
    value = float(digits)
    if math.isinf(value):
        raise ValueError("Number out of range")
    return value


decode_valid = msgspec.json.Decoder(float_hook=to_float).decode
"""Decoder of JSON that has only characters. It raises as `decode`, which is for everything else, too."""
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_UNPAIRED = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
_BACKSLASH, _MASK = rb"\\", b"\0\0"
_TEXTS = re.compile(rb'"[^"]*"')
_REPLACEMENT = "\ufffd".encode()


def _ignore() -> None:
    pass


def decode(text: str | bytes, replaced: Callable[[], None] = _ignore) -> Any:
    """Return the JSON value of a text; a byte order mark before it is skipped.

    `replaced` is called if bytes that are no UTF-8 were replaced. Raises `ValueError` (also as `msgspec.DecodeError`)
    and `RecursionError`.
    """
    try:
        return decode_valid(text)
    except ValueError:
        raw = text.encode() if isinstance(text, str) else text
        readable = as_characters(raw, replaced)
        if readable == raw:
            raise
        return decode_valid(readable)


def decode_body(data: bytes, replaced: Callable[[], None]) -> Any:
    """Return the JSON value of an agent's body; `replaced` is called as by `decode`.

    Raises `AgentError` 400, or 413 for more values than `MAX_VALUES`: a small body can have many, each an object in
    memory.
    """
    # Every value takes at least one byte, so most bodies need not be searched.
    too_many = len(data) > MAX_VALUES and has_too_many_values(data)
    try:
        if not too_many:
            return decode(data, replaced)
        msgspec.json.decode(data, type=msgspec.Raw)  # raises for invalid JSON, without creating any values
    except (ValueError, RecursionError):
        raise AgentError(400, "the body is not valid JSON") from None
    raise AgentError(413, f"the body has more than {MAX_VALUES} values")


def has_too_many_values(data: bytes, limit: int = MAX_VALUES) -> bool:
    """Return True if a JSON text may have more values than `limit`: they take far more memory than its bytes.

    Names in objects count as values. No step may take long for any text of some MB, because this blocks the event loop.
    """
    if len(data) <= limit or _count_values(data) <= limit:
        return False
    plain = _without_escapes(data)
    return plain.count(b'"') // 2 > limit or _count_values(_TEXTS.sub(b"", plain)) > limit


def memory_of_values(data: bytes) -> int:
    """Return about how many bytes of memory the decoded values of a JSON text take besides its own bytes.

    The first `FREE_VALUES` are not counted. The number of values must be bounded already.
    """
    if len(data) <= FREE_VALUES or _count_values(data) <= FREE_VALUES:
        return 0
    return VALUE_BYTES * max(0, _count_values(_TEXTS.sub(b"", _without_escapes(data))) - FREE_VALUES)


def _without_escapes(data: bytes) -> bytes:
    """Return a JSON text without escaped quotes and backslashes: each quote that is left begins or ends a text."""
    return data.replace(_BACKSLASH, b"").replace(rb"\"", b"")


def _count_values(data: bytes) -> int:
    """Return an upper bound on the number of values in a JSON text.

    Every value but the first follows one of the counted characters, which may also occur within strings.
    """
    return data.count(b",") + data.count(b":") + data.count(b"[") + data.count(b"{")


def as_characters(raw: bytes, replaced: Callable[[], None] = _ignore) -> bytes:
    """Return a JSON text as UTF-8 without a byte order mark, with U+FFFD for everything that is no character."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        raw.decode()
        characters = raw
    except UnicodeDecodeError:
        characters = _mended(raw)
        replaced()
    # `\\` followed by `ud83d` is an escaped backslash and five letters, not a surrogate. So escaped backslashes are
    # replaced by NULs for the search: JSON has no NUL of its own.
    if b"\0" in characters or rb"\u" not in characters:
        return characters
    return _UNPAIRED.sub(rb"\\ufffd", characters.replace(_BACKSLASH, _MASK)).replace(_MASK, _BACKSLASH)


def _mended(raw: bytes) -> bytes:
    """Replace each byte that begins no character by one U+FFFD, as Go does (Python's own handler merges some).

    Millions of such bytes must not block the event loop, so every step is one that Python does in C. The codec replaces
    each of them by `?`, so real question marks become NULs before, and are restored after. JSON has no NUL: one in the
    input becomes a question mark, too.
    """
    text = raw.decode("utf-8", "surrogateescape").replace("?", "\0")
    return text.encode("utf-8", "replace").replace(b"?", _REPLACEMENT).replace(b"\0", b"?")
