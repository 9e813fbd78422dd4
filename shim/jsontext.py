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
# Every escape is matched, so that the `u` behind an escaped backslash begins none.
_ESCAPE = re.compile(rb"\\u(?i:d[89ab][0-9a-f]{2})\\u(?i:d[c-f][0-9a-f]{2})|(\\u(?i:d[89a-f][0-9a-f]{2}))|\\.")


def decode(text: str | bytes) -> Any:
    """The JSON value of a text. Raises `ValueError` (of which `msgspec.DecodeError` is one), `RecursionError`."""
    try:
        return _decode(text)
    except msgspec.DecodeError:
        raw = text.encode() if isinstance(text, str) else text
        if not any(match[1] for match in _ESCAPE.finditer(raw)):
            raise
        return _decode(_ESCAPE.sub(lambda match: rb"\ufffd" if match[1] else match[0], raw))
