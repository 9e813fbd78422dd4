"""Replies of other replicas, cut into pieces anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.protocol.reply_reader import MAX_HEAD_BYTES, ReplyError, ReplyReader

CASES = {
    b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n": (204, b""),
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello": (200, b"hello"),
    b"HTTP/1.1 503 \r\nContent-Length: 0\r\n\r\n": (503, b""),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n": (
        200,
        b"abc0123456789",
    ),
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n": (304, b""),
}


@given(st.sampled_from(sorted(CASES)), st.data())
def test_a_reply_is_read_wherever_it_is_cut(reply: bytes, data: st.DataObject) -> None:
    reader = ReplyReader()
    found = b""
    rest = reply + b"the next"
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += b"".join(reader.feed(rest[:size]))
        rest = rest[size:]
    status, body = CASES[reply]
    assert reader.head is not None
    assert (reader.head.status, found) == (status, body)
    assert reader.done
    assert reader.rest == b"the next"


def test_a_head_request_has_no_body_whatever_its_length_says() -> None:
    reader = ReplyReader(head_only=True)
    assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n") == []
    assert reader.done


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    reader = ReplyReader()
    assert b"".join(reader.feed(b"HTTP/1.1 200 OK\r\n\r\nso much")) == b"so much"
    assert not reader.done
    assert reader.closed()


def test_a_body_that_breaks_off_is_not_whole() -> None:
    reader = ReplyReader()
    reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
    assert not reader.closed()


@pytest.mark.parametrize(
    "bytes_in",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"x" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_what_is_no_reply_is_refused(bytes_in: bytes) -> None:
    with pytest.raises(ReplyError):
        ReplyReader().feed(bytes_in)
