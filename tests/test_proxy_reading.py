"""What is read of the vendor's HTTP API's replies, by every composition."""

from __future__ import annotations

import pytest

from shim.passthrough.proxy import object_of


@pytest.mark.parametrize(
    "body, found",
    [
        (b'{"commands": [{"id": "c-1", "note": "\\ud83d"}]}', {"commands": [{"id": "c-1", "note": "\ufffd"}]}),
        (b"[1]", {}),
        (b"<html>", {}),
        (b"", {}),
    ],
)
def test_a_reply_is_read_as_leniently_as_everywhere(body: bytes, found: dict[str, object]) -> None:
    """Commands that count as unread would give way to others, and nobody would hand them out again."""
    assert object_of(body) == found
