"""Anything at all into the legacy parsers, the upstream decoder and a whole bridge: nothing raises what it should not.

10,000 inputs in the suite; `make fuzz` (INPUTS=n) plays a million. A failing input is shown by hypothesis.
"""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from shim.agent_api.admission import Router
from shim.agent_api.responses import encode_body
from shim.core.agent_calls import Accepted, Commands, Failed, Healthy, OfferedCommand, Outcome, Registered, TunnelState
from shim.errors import AgentError, MessageError
from shim.protocol import dialects
from shim.protocol.command_message import MalformedCommand, parse_command
from shim.protocol.controller_replies import (
    REFUSED_TYPES,
    conflict_reply,
    error_status,
    error_text,
    refuse,
    register_reply,
    tunnel_state,
)
from shim.protocol.dialects import Call, Match
from shim.protocol.lenient_json import decode_body
from shim.protocol.upstream_message import Message, decode, encode
from tests.chaos.harness.mutation import bodies, frames, mutated
from tests.support.frontend import HEALTH, House, running
from tests.support.generations import ALL, Verdict
from tests.support.upstream import FakeSocket
from tests.support.virtual import run_virtual
from tests.support.world import World

INPUTS = int(os.environ.get("AGENT_SHIM_FUZZ_INPUTS", "10000"))
BATCH = 50
GROWTH_BYTES = 2_000_000
PRELOAD = 2_000
# The shares of the tests; what is left goes to the bridge.
STRUCTURED, MUTATED = INPUTS * 3 // 100, INPUTS * 42 // 100

ROUTER = Router(dialects.load())
ROUTES = [(dialect, route) for dialect in dialects.load() for route in dialect.ROUTES]
ENCODER = msgspec.json.Encoder()

pytestmark = pytest.mark.timeout(60 + INPUTS // 50)


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=max(1, examples),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
KEYS = st.sampled_from(
    [
        *("agent_id", "id", "name", "cluster_name", "cluster_id", "status", "tunnel_status", "metadata", "labels"),
        *("success", "output", "error", "timestamp", "version", "k8s_service_token", "server_specs", "tunnel_config"),
        *("command_id", "type", "command", "action", "payload", "params", "args", "created_at", "expires_at"),
        *("ttl_seconds", "forwards", "remote_port", "poll_frequency", "credentials", "code", "workspace_id"),
        *("registered_at", "gateway_ws_url", "prometheus_url", "request_id", "stream_id"),
    ]
) | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
TYPES = st.sampled_from(
    [
        *("register_success", "register_in_progress", "heartbeat_ack", "command", "tunnel_status", "ping", "pong"),
        *("error", "proxy_request", "ws_start", "tcp_tunnel_start", "proxy_cancel", "udp_tunnel_data", "unknown"),
    ]
)  # fmt: skip
OUTCOMES: tuple[Outcome, ...] = (
    Registered("c-1", "u-1", "prod", "pod-1", workspace_id=7, registered_at="2026-11-24T21:28:03Z"),
    Accepted(),
    Commands((OfferedCommand("k1", "t", {"a": [1, None]}, "2026-11-24T21:28:03Z"),), 5),
    TunnelState({"status": "REQUIRED", "forwards": [{"name": "x", "remote_port": 1}]}, 5),
    Healthy(),
    Failed(409, "already registered", cluster_id="c-1"),
)  # fmt: skip


def expect(holds: bool, error: Exception) -> None:
    """An error of ours is one that may be raised here."""
    assert holds, repr(error)


# --- the legacy side --------------------------------------------------------------------------------------------------


def serve(match: Match, body: Any, user_agent: str) -> None:
    """What the frontend does with a request; what comes of it must go on to the disk, upstream, and to the agent."""
    call = Call(match.params, body, user_agent)
    try:
        parsed = match.dialect.parse(match.route.operation, call)
    except AgentError as error:
        expect(error.status in (400, 404, 405), error)
        return
    for name in ("payload", "body", "known"):
        found = getattr(parsed, name, None)
        if isinstance(found, dict):
            frame = encode(Message("status", found))
            assert decode(frame).type == "status"
    for outcome in OUTCOMES:
        reply = match.dialect.render(match.route.operation, outcome, call)
        if reply.body is not None:
            assert isinstance(msgspec.json.decode(encode_body(reply.body)), dict)


def request(method: str, path: str, data: bytes, user_agent: str = "") -> None:
    try:
        match = ROUTER.match(method, path)
        body = decode_body(data, lambda: None)
    except AgentError as error:
        expect(error.status in (400, 404, 405), error)
        return
    serve(match, body, user_agent)


@fuzzed(STRUCTURED)
@given(st.sampled_from(ROUTES), st.dictionaries(KEYS, JSON, max_size=8) | JSON, st.text(max_size=12))
def test_any_json_at_any_route(entry: tuple[Any, Any], body: Any, ident: str) -> None:
    dialect, route = entry
    names = [part[1:-1] for part in route.pattern.split("/") if part.startswith("{")]
    match = Match(dialect, route, dict.fromkeys(names, ident or "x"))
    assume(_encodable(body))
    serve(match, msgspec.json.decode(ENCODER.encode(body)), "Go-http-client/1.1")


def _encodable(value: Any) -> bool:
    try:
        ENCODER.encode(value)
    except (UnicodeEncodeError, msgspec.ValidationError, OverflowError):
        return False
    return True


@fuzzed(MUTATED // BATCH)
@given(st.integers(0, 2**64))
@example(0)
def test_any_bytes_as_a_request(seed: int) -> None:
    rng = Random(seed)
    for _ in range(BATCH):
        method, path, body = rng.choice(BODIES)
        if rng.random() < 0.3:
            path = mutated(path.encode(), rng).decode("latin-1")
        request(method, path, mutated(body, rng))


BODIES = tuple(bodies())


RAW = max(200, INPUTS // 50)
AT_ONCE = 50
QUIET_S = 0.2
SECRET = "canary-of-the-token"


def raw_requests(rng: Random) -> bytes:
    """A request with a token, as bytes on a connection, changed anywhere."""
    method, path, body = rng.choice(BODIES)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRET}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return mutated(head.encode() + body, rng)


async def converse(house: House, data: bytes) -> bytes:
    """Everything that comes back until the server closes, or has nothing to say for a moment."""
    agent = await house.agent()
    got = b""
    try:
        await agent.send(data)
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(QUIET_S):
                    more = await agent.receive()
                if not more:
                    break
                got += more
    finally:
        agent.close()
    return got


async def test_any_bytes_on_a_connection() -> None:
    """The HTTP parser's own refusals included: JSON errors without what was sent, and the server lives."""
    rng = Random(7)
    async with running(token=lambda: SECRET) as house:
        for _ in range(0, RAW, AT_ONCE):
            requests = [raw_requests(rng) for _ in range(AT_ONCE)]
            for sent, got in zip(requests, await asyncio.gather(*(converse(house, r) for r in requests)), strict=True):
                assert got == b"" or got.startswith(b"HTTP/1.1 "), sent
                assert SECRET.encode() not in got, sent
                head, _, body = got.partition(b"\r\n\r\n")
                if head[9:10] in (b"4", b"5"):
                    assert body.startswith(b'{"success":false,"error":"'), (sent, got)
        assert house.count("internal_errors_total", part="frontend") == 0
        assert (await house.ask(HEALTH)).status == 200


# --- the upstream side ------------------------------------------------------------------------------------------------


def receive(frame: bytes) -> None:
    """What the upstream side does with a frame."""
    try:
        message = decode(frame)
    except MessageError as error:
        expect(error.kind in ("not_json", "not_object", "no_type", "bad_payload"), error)
        return
    payload = message.payload
    reply = register_reply(payload)
    assert reply == {} or reply["cluster_id"]
    assert 400 <= error_status(payload) < 600
    assert error_text(payload).isprintable()
    assert isinstance(conflict_reply(payload), dict)
    for kind in REFUSED_TYPES:
        refusal = refuse(kind, message.request_id, payload)
        assert refusal is None or encode(Message(refusal[0], refusal[2], refusal[1]))
    seen_by_agents(TunnelState(tunnel_state(payload), 5), "tunnel_poll")
    if reply:
        known = {name: reply.get(name, "") for name in ("name", "status", "tunnel_url", "api_server")}
        more = {name: reply.get(name) for name in ("workspace_id", "registered_at")}
        seen_by_agents(
            Registered(reply["cluster_id"], reply["cluster_uuid"], agent_id="a", **known, **more), "register"
        )
    try:
        command = parse_command(message, 1.8e9, 60.0, lambda: "new")
    except MalformedCommand:
        return
    offered = OfferedCommand(command.id, command.type, command.payload, command.created_at)
    seen_by_agents(Commands((offered,), 5), "poll")


def seen_by_agents(outcome: Outcome, operation: str) -> None:
    """No generation gets a reply that it cannot decode."""
    for dialect, route in ROUTES:
        if route.operation != operation:
            continue
        reply = dialect.render(operation, outcome, Call({}, None, ""))
        body = b"" if reply.body is None else encode_body(reply.body)
        for generation in ALL:
            if generation.dialect == dialect.NAME and operation in generation.routes:
                reading = generation.read(operation, reply.status, body)
                assert reading.verdict is not Verdict.BROKEN, (generation.label, reading.reason, body)


@fuzzed(STRUCTURED)
@given(TYPES, st.dictionaries(KEYS, JSON, max_size=8), JSON, JSON)
def test_any_envelope(kind: str, payload: dict[str, Any], request_id: Any, timestamp: Any) -> None:
    envelope = {"type": kind, "payload": payload, "request_id": request_id, "timestamp": timestamp}
    if _encodable(envelope):
        receive(ENCODER.encode(envelope))


@fuzzed(MUTATED // BATCH)
@given(st.integers(0, 2**64))
@example(0)
def test_any_bytes_as_a_frame(seed: int) -> None:
    rng = Random(seed)
    for _ in range(BATCH):
        receive(mutated(rng.choice(FRAMES), rng))


FRAMES = tuple(frames())


# --- a whole bridge ---------------------------------------------------------------------------------------------------


async def _online() -> tuple[World, FakeSocket]:
    world = World().start()
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    await world.settle()
    return world, world.controller.socket


def _messages(rng: Random, count: int) -> Iterator[Message]:
    """Envelopes as the decoder would let them through."""
    while count:
        try:
            message = decode(mutated(rng.choice(FRAMES), rng, gently=True))
        except MessageError:
            continue
        count -= 1
        yield message


def test_any_message_leaves_a_bridge_at_work_and_no_larger_than_its_bounds() -> None:
    """A controller gone mad: no handler fails, the link stays up, what is remembered of it is bounded."""

    async def scenario() -> None:
        rng = Random(5)
        world, socket = await _online()
        sizes: list[int] = []
        tracemalloc.start()
        try:
            for batch in (PRELOAD, INPUTS // 10):
                for message in _messages(rng, batch):
                    socket.says(message.type, message.payload, message.request_id, message.timestamp)
                    await asyncio.sleep(0)
                await world.settle()
                world.controller.log.clear()
                for sent_to in world.controller.sockets:
                    sent_to.sent.clear()
                world.store.log.clear()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        assert not world.faults, world.faults[0]
        assert socket.open
        assert world.metric("internal_errors_total", part="upstream") == 0
        stored_bytes = 4096 * len(list(world.bridge.queues.items())) + 2048 * len(world.bridge.outbox)
        assert sizes[1] - sizes[0] < GROWTH_BYTES + INPUTS * 100 + stored_bytes
        await world.stop()

    run_virtual(scenario())
