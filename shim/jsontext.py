"""JSON from others, read as leniently as Go reads it: an unpaired surrogate in a text becomes U+FFFD.

RFC 8259 §8.2 leaves open what becomes of half an escaped pair (`ud83d` alone). Programs do write it: a JavaScript text
that was cut in the middle of a character, Python's way to keep bytes that are no UTF-8. No command or result is
to be lost for it.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

_decode = msgspec.json.Decoder().decode
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_UNPAIRED = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
_BACKSLASH, _MASK = rb"\\", b"\0\0"


def decode(text: str | bytes) -> Any:
    """The JSON value of a text. Raises `ValueError` (of which `msgspec.DecodeError` is one), `RecursionError`."""
    try:
        return _decode(text)
    except msgspec.DecodeError:
        raw = text.encode() if isinstance(text, str) else text
        # NUL is in no JSON, and so can hide escaped backslashes: what follows them is no escape
        if b"\0" in raw or rb"\u" not in raw:
            raise
        mended = _UNPAIRED.sub(rb"\\ufffd", raw.replace(_BACKSLASH, _MASK)).replace(_MASK, _BACKSLASH)
        if mended == raw:
            raise
        return _decode(mended)
