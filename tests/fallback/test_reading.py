"""What is read of the vendor's HTTP API's replies, by every composition."""

from __future__ import annotations

import pytest

from shim.fallback.reverse_proxy import object_of


@pytest.mark.parametrize(
    "body, found",
    [
        (b'{"commands": [{"id": "c-1", "note": "\\ud83d"}]}', {"commands": [{"id": "c-1", "note": "\ufffd"}]}),
        (b'{"commands": [{"id": "c-1", "note": "\xe9"}]}', {"commands": [{"id": "c-1", "note": "\ufffd"}]}),
        (b'{"commands": [{"id": "c-1", "n": 1e400}]}', None),
        (b'{"commands": [' + b"[]," * 250_000 + b"[]]}", None),
        (b"[1]", None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_a_reply_is_read_as_leniently_as_everywhere(body: bytes, found: dict[str, object] | None) -> None:
    """Commands that count as unread would give way to others, and nobody would hand them out again."""
    replaced: list[int] = []
    assert object_of(body, lambda: replaced.append(1)) == found
    assert len(replaced) == (b"\xe9" in body)
