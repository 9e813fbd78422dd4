"""WebSocket messages as bytes in several ways: whole, in fragments, with pings in between; and read back."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from random import Random

from shim.ports import Frame
from tests.chaos.harness.http_requests import pieces_of
from tests.chaos.harness.mutation import frames, mutated
from tests.chaos.harness.ways import LONGEST_BYTE_BY_BYTE, Segments

MAX_MESSAGE_BYTES = 70_000
BETWEEN = b"between fragments"
"""Payload of the pings between fragments: `read_frames` leaves them and their pongs out."""
END = b"end of the conversation"
"""Payload of the ping behind all that is sent: whoever answers it has read everything before it."""

_OPCODES = {"text": 1, "binary": 2, "close": 8, "ping": 9, "pong": 10}
_KINDS = {opcode: kind for kind, opcode in _OPCODES.items()}
_SIZES = (0, 1, 125, 126, 127, 4000, 65_535, 65_536, MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES + 1)
_REGISTER = (
    b'{"type":"register","request_id":"r-1","payload":{"name":"prod","agent_id":"a","cluster_id":"c-1"}}',
    b'{"type":"register","request_id":"r-2","payload":{"name":"stage"}}',
    b'{"type":"heartbeat","payload":{"status":"available"}}\n{"type":"status","payload":{}}',
)
_MESSAGES = (*frames(), *_REGISTER)
_KEY = re.compile(rb"\r\nsec-websocket-key: *([^\r]+)\r\n", re.IGNORECASE)
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def accepting(handshake: bytes) -> bytes:
    """Return a controller's response to a WebSocket handshake."""
    key = _KEY.search(handshake)
    assert key is not None, handshake
    accept = base64.b64encode(hashlib.sha1(key[1] + _GUID, usedforsecurity=False).digest())
    lines = [b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade"]
    return b"\r\n".join([*lines, b"Sec-WebSocket-Accept: " + accept, b"", b""])


# --- writing ----------------------------------------------------------------------------------------------------------


def frame(opcode: int, data: bytes, mask: bytes = b"", *, fin: bool = True) -> bytes:
    """Return one frame. Clients mask with four bytes, servers not at all."""
    size, masked = len(data), 0x80 if mask else 0
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([masked | size])
    elif size < 65_536:
        head += bytes([masked | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([masked | 127]) + size.to_bytes(8, "big")
    return head + mask + _masked(data, mask)


def _masked(data: bytes, mask: bytes) -> bytes:
    if not mask or not data:
        return data
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")


def whole(message: Frame, mask: bytes = b"") -> bytes:
    """Return a message in one frame."""
    return frame(_OPCODES[message.kind], message.data, mask)


def fragmented(message: Frame, rng: Random, mask: bytes = b"") -> list[bytes]:
    """Return a message of text or bytes in fragments, some of them empty, with pings in between."""
    if message.kind not in ("text", "binary"):
        return [whole(message, mask)]
    parts = pieces_of(message.data, rng)
    parts.insert(rng.randrange(len(parts) + 1), b"")
    found = []
    for number, part in enumerate(parts):
        opcode = 0 if number else _OPCODES[message.kind]
        found.append(frame(opcode, part, mask, fin=number == len(parts) - 1))
        if number < len(parts) - 1 and rng.random() < 0.5:
            found.append(frame(_OPCODES["ping"], BETWEEN, mask))
    return found


def conversation(rng: Random) -> list[Frame]:
    """Return messages as a controller or an agent sends them, some changed anywhere, some of every size."""
    return [_message(rng) for _ in range(rng.choice((1, 2, 4)))]


def _message(rng: Random) -> Frame:
    kind = rng.choice(("text", "text", "text", "binary", "ping", "pong", "close"))
    match kind:
        case "ping" | "pong":
            return Frame(kind, rng.choice((b"", b"p", b"p" * 125)))
        case "close":
            code = rng.choice((1000, 1001, 1005, 1008, 1012, 4001, 999, 0)).to_bytes(2, "big")
            return Frame("close", rng.choice((b"", code, code + b"bye", code + "é".encode()[:1])))
        case _:
            data = rng.choice(_MESSAGES)
            if rng.random() < 0.3:
                data = mutated(data, rng)
            elif rng.random() < 0.2:
                data = b"[" + data + b"," + data + b"]"
            elif rng.random() < 0.2:
                size = rng.choice(_SIZES)
                data = (data + b" " * size)[:size]
            return Frame("text" if kind == "text" else "binary", data)


def spoilt(sent: bytes, rng: Random) -> bytes:
    """Return bytes of frames, changed anywhere: most are a violation of the protocol."""
    return mutated(sent, rng)


# --- the ways in which the same bytes arrive --------------------------------------------------------------------------


def cut(joined: bytes, rng: Random) -> Iterator[tuple[str, Segments]]:
    """Yield the same bytes in one segment and in many."""
    yield "joined", [[joined]]
    if not joined:
        return
    yield "cut", [pieces_of(joined, rng)]
    yield "cut, with time in between", [[piece] for piece in pieces_of(joined, rng)]
    if len(joined) <= LONGEST_BYTE_BY_BYTE:
        yield "byte by byte", [[bytes([byte]) for byte in joined]]
        yield "byte by byte, with time in between", [[bytes([byte])] for byte in joined]


def arrivals(messages: Iterable[Frame], rng: Random, *, masked: bool) -> Iterator[tuple[str, Segments]]:
    """Yield the same messages in frames and fragments, each of which arrives in many ways; first one frame a time."""
    messages = list(messages)
    mask = rng.randbytes(4) if masked else b""
    frames_of = [whole(message, mask) for message in messages]
    yield "one by one", [[each] for each in frames_of]
    for name, segments in cut(b"".join(frames_of), rng):
        yield name, segments
    mask = rng.randbytes(4) if masked else b""
    fragments = [fragment for message in messages for fragment in fragmented(message, rng, mask)]
    yield "in fragments", [[each] for each in fragments]
    for name, segments in cut(b"".join(fragments), rng):
        yield f"in fragments, {name}", segments


# --- reading ----------------------------------------------------------------------------------------------------------


def read_frames(data: bytes) -> list[Frame]:
    """Return the messages in bytes that the shim has written, without the pings between fragments and their pongs.

    Raises `AssertionError` for bytes that are no complete frames.
    """
    found, at = [], 0
    while at < len(data):
        opcode, masked, size = data[at] & 0x0F, data[at + 1] & 0x80, data[at + 1] & 0x7F
        assert data[at] & 0xF0 == 0x80, "the shim sends no fragments"
        at += 2
        if size > 125:
            width = 2 if size == 126 else 8
            size, at = int.from_bytes(data[at : at + width], "big"), at + width
        mask, at = (data[at : at + 4], at + 4) if masked else (b"", at)
        assert at + size <= len(data), "a frame is incomplete"
        found.append(Frame(_KINDS[opcode], _masked(data[at : at + size], mask)))
        at += size
    return [each for each in found if each.data != BETWEEN]
