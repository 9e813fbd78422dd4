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
_AS_GO = "shim.as-go"


def _one_for_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace as Go does: each byte that begins no character by one U+FFFD (Python would merge some of them)."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_AS_GO, _one_for_each_byte)


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
    characters = raw.decode("utf-8", _AS_GO).encode()
    if characters != raw:
        replaced()
    # NUL is in no JSON, and so can hide escaped backslashes: what follows them is no escape
    if b"\0" in characters or rb"\u" not in characters:
        return characters
    return _UNPAIRED.sub(rb"\\ufffd", characters.replace(_BACKSLASH, _MASK)).replace(_MASK, _BACKSLASH)
