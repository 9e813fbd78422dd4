r"""Read JSON from others as leniently as Go reads it: what is no character becomes U+FFFD.

RFC 8259 leaves open what becomes of an unpaired surrogate such as `\ud83d`, and of bytes that are no UTF-8. Programs do
write both: a JavaScript text that was cut in the middle of a character, a command's output in Latin-1. No command and
no result may be lost for it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

import msgspec

_decode = msgspec.json.Decoder().decode
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_UNPAIRED = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
_BACKSLASH, _MASK = rb"\\", b"\0\0"
_REPLACEMENT = "\ufffd".encode()


def _ignore() -> None:
    pass


def decode(text: str | bytes, replaced: Callable[[], None] = _ignore) -> Any:
    """Return the JSON value of a text; a byte order mark before it is skipped.

    `replaced` is called when bytes that are no UTF-8 were replaced. Raises `ValueError` (of which
    `msgspec.DecodeError` is one), `RecursionError`.
    """
    try:
        return _decode(text)
    except ValueError:
        raw = text.encode() if isinstance(text, str) else text
        readable = as_characters(raw, replaced)
        if readable == raw:
            raise
        return _decode(readable)


def as_characters(raw: bytes, replaced: Callable[[], None] = _ignore) -> bytes:
    """Return a JSON text as UTF-8 without a byte order mark, with U+FFFD for whatever is no character."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        raw.decode()
        characters = raw
    except UnicodeDecodeError:
        characters = _mended(raw)
        replaced()
    # NUL is in no JSON, and so can hide escaped backslashes: what follows them is no escape
    if b"\0" in characters or rb"\u" not in characters:
        return characters
    return _UNPAIRED.sub(rb"\\ufffd", characters.replace(_BACKSLASH, _MASK)).replace(_MASK, _BACKSLASH)


def _mended(raw: bytes) -> bytes:
    """Replace each byte that begins no character by one U+FFFD, as Go does (Python's own handler merges some of them).

    Millions of such bytes must not hold up the event loop, so every step is one that Python does in C: the codec writes
    each of them as `?`, for which the real ones have made room. A NUL, which no JSON has, becomes one as well.
    """
    text = raw.decode("utf-8", "surrogateescape").replace("?", "\0")
    return text.encode("utf-8", "replace").replace(b"?", _REPLACEMENT).replace(b"\0", b"?")
