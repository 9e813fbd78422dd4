"""Real requests and frames, and what becomes of them when bytes are changed at random; the same for a seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.support.generations import ALL, Who

_NASTY = (
    *(b"null", b"true", b"[]", b"{}", b'""', b"-0", b"1e999", b"9" * 400, b"1.5", b"NaN", b"\xff", b"\x00", b"\\ud800"),
    *(b'"\\u0000"', b"[" * 200, b"{" * 70, b'{"a":' * 70, b'"' + b"a" * 300 + b'"', b"9223372036854775808"),
    *(b"..", b"%2f", b"%00", b"/", b"//", b"?", b"#", b"\xe2\x80\xae", b"-1"),
    *(b'"2026-11-24T21:28:03Z"', b'"0000-00-00T00:00:00Z"'),
)  # fmt: skip


def mutated(data: bytes, rng: Random, *, gently: bool = False) -> bytes:
    """The same with a few changes; `gently`: mostly of values, so that it still decodes more often than not."""
    changed = bytearray(data)
    for _ in range(1 if gently else rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(2 if gently else 6):
            case 0:
                changed = _value_replaced(changed, rng)
            case 1:
                changed = _value_swapped(changed, rng)
            case 2:
                changed[at:at] = rng.choice(_NASTY)
            case 3:
                del changed[at : at + rng.randint(1, 30)]
            case 4 if changed:
                changed[at % len(changed)] = rng.randrange(256)
            case _:
                changed += changed[at : at + rng.randint(1, 60)]
    return bytes(changed)


def _value_replaced(data: bytearray, rng: Random) -> bytearray:
    """Replace a value: the bytes between a colon and the next comma or brace."""
    starts = [index + 1 for index, byte in enumerate(data) if byte == 0x3A]
    if not starts:
        return data
    start = rng.choice(starts)
    end = start
    while end < len(data) and data[end] not in b",}]":
        end += 1
    return data[:start] + rng.choice(_NASTY) + data[end:]


def _value_swapped(data: bytearray, rng: Random) -> bytearray:
    """Two keys change places."""
    keys = [part for part in bytes(data).split(b'"') if part.replace(b"_", b"").isalpha()]
    if len(keys) < 2:
        return data
    one, other = rng.sample(keys, 2)
    return bytearray(bytes(data).replace(b'"' + one + b'"', b'"' + other + b'"', 1))


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """Method, path and body of every call of every generation."""
    who = Who()
    for generation in ALL:
        for operation in generation.routes:
            request = generation.request(operation, who)
            body = b"" if request.body is None else json.dumps(request.body).encode()
            yield request.method, request.path, body


def frames() -> Iterator[bytes]:
    """Messages that a controller sends."""
    at = "2026-11-24T21:28:03.5Z"
    said: list[tuple[str, dict[str, Any]]] = [
        ("register_success", {"cluster_id": "c-1", "cluster_uuid": "u-1", "name": "prod", "status": "registered"}),
        ("register_success", {"cluster_id": 7, "workspace_id": 3.0, "registered_at": at, "token": "x"}),
        ("register_in_progress", {}),
        ("heartbeat_ack", {"received_at": at}),
        ("command", {"command_id": "k1", "type": "exec", "payload": {"a": [1, 2.5, None]}, "cluster_id": "c-1"}),
        ("command", {"id": 12, "action": "scale", "params": {"n": 3}, "ttl_seconds": 60, "created_at": at}),
        ("command", {"command": "x", "args": ["a"], "expires_at": at, "agent_id": "pod-1"}),
        (
            "tunnel_status",
            {"status": "REQUIRED", "forwards": [{"name": "k", "remote_port": 8000}], "poll_frequency": 5},
        ),
        ("error", {"error": "cluster not registered", "code": "not_found"}),
        ("error", {"error": "already exists", "code": 409, "cluster": {"id": "c-2"}}),
        ("ping", {"timestamp": at}),
        ("proxy_request", {"request_id": "p1", "method": "GET", "path": "/", "supports_response_streaming": True}),
        ("proxy_websocket_start", {"stream_id": "s1"}),
        ("tcp_tunnel_start", {"tunnel_id": "t1", "service_port": 80}),
        ("udp_tunnel_data", {"data": "aGk="}),
    ]
    for kind, payload in said:
        yield json.dumps({"type": kind, "request_id": "r-1", "payload": payload, "timestamp": at}).encode()
