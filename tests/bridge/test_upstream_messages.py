"""What the controller says, sense or nonsense (docs/reference/protocol.md#2-upstream-side-the-websocket)."""

from __future__ import annotations

from typing import Any

import pytest

from shim.core.agent_calls import TunnelState
from shim.protocol.controller_replies import LEFTOVER_TYPES, REASON
from tests.support.world import World


async def test_json_pings_are_answered_with_their_id(world: World) -> None:
    world.controller.socket.says("ping", {"x": 1}, "p-1")
    world.controller.socket.says("ping")
    await world.settle()
    first, second = world.controller.got("pong")
    assert (first.request_id, second.request_id) == ("p-1", "")
    assert first.payload == {"timestamp": "2026-11-24T21:28:03.000Z"}


@pytest.mark.parametrize(
    "kind, payload, answer, request_id",
    [
        ("proxy_request", {"method": "GET"}, "proxy_error", "r"),
        ("proxy_request", {"supports_response_streaming": True}, "proxy_response_abort", "r"),
        ("ws_start", {"stream_id": "s-1"}, "proxy_error", "s-1"),
        ("proxy_websocket_start", {"stream_id": "s-1"}, "proxy_error", "s-1"),
        ("tcp_tunnel_start", {"tunnel_id": "t"}, "tcp_tunnel_close", "r"),
    ],
)
async def test_what_a_legacy_agent_cannot_serve_is_refused_at_once(
    world: World, kind: str, payload: dict[str, Any], answer: str, request_id: str
) -> None:
    world.controller.socket.says(kind, payload, "r")
    await world.settle()
    [refusal] = world.controller.got(answer)
    assert refusal.request_id == request_id
    assert refusal.payload["error"] == REASON
    assert world.metric("upstream_refused_total", type=kind) == 1


async def test_streaming_leftovers_are_dropped_and_counted(world: World) -> None:
    for kind in sorted(LEFTOVER_TYPES):
        world.controller.socket.says(kind, {}, "r")
    await world.settle()
    assert not world.controller.log
    assert world.metric("upstream_leftovers_total") == len(LEFTOVER_TYPES)


async def test_unknown_types_are_said_once_each_and_not_without_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(200):
        world.controller.socket.says(f"kind-{number}")
        world.controller.socket.says("kind-0")
    await world.settle()
    said = [r.fields["type"] for r in caplog.records if r.getMessage() == "unknown_type"]  # type: ignore[attr-defined]
    assert len(said) == len(set(said)) == 64
    assert world.controller.socket.open


async def test_nothing_that_is_in_a_message_costs_the_connection(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    deep: Any = 1
    for _ in range(800):
        deep = [deep]
    odd: list[Any] = [None, True, 5, -1.5, "", "x" * 10_000, [], {}, [[]], {"id": {}}, deep, 10**400, "../", "\x00"]
    kinds = "register_success register_in_progress heartbeat_ack command tunnel_status ping pong error proxy_request"
    keys = (
        "cluster_id agent_id command_id id type payload error code gateway_ws_url stream_id status forwards expires_at"
    )
    for kind in [*kinds.split(), "ws_start", "tcp_tunnel_start", "\x00"]:
        for value in odd:
            world.controller.socket.says(kind, dict.fromkeys(keys.split(), value), "r")
            world.controller.socket.says(kind, {"payload": value}, "")
    await world.settle()
    assert not world.faults
    assert world.controller.socket.open
    world.controller.push("k-good", cluster_id=agent.cluster_id)
    await world.settle()
    polled: list[str] = []
    for _ in range(10):
        polled += await agent.poll()
    assert "k-good" in polled


# --- tunnel state -----------------------------------------------------------------------------------------------------


async def test_the_latest_tunnel_state_replaces_the_default_reply(world: World) -> None:
    agent = world.agent()
    await agent.register()
    assert await agent.tunnel_poll() == TunnelState(None, 5)
    for status in ("REQUIRED", "ACTIVE"):
        said = {"cluster_id": "c-1", "status": status, "forwards": [{"name": "api", "remote_port": 9}], "more": 1}
        world.controller.socket.says("tunnel_status", said)
    await world.settle()
    expected = TunnelState({"status": "ACTIVE", "forwards": [{"name": "api", "remote_port": 9}]}, 5)
    assert await agent.tunnel_poll() == expected
    assert await agent.tunnel_poll() == expected, "a state, not a queue"


async def test_a_tunnel_state_without_a_clear_target_is_nobodys(world: World, caplog: pytest.LogCaptureFixture) -> None:
    agents = [world.agent(name=f"n{n}", agent_id=f"pod-{n}") for n in range(2)]
    for agent in agents:
        await agent.register()
        await agent.heartbeat()
    world.controller.socket.says("tunnel_status", {"status": "ACTIVE"})
    world.controller.socket.says("tunnel_status", {"status": "ACTIVE", "agent_id": "nobody"})
    await world.settle()
    assert [await agent.tunnel_poll() for agent in agents] == [TunnelState(None, 5)] * 2
    assert [r.getMessage() for r in caplog.records].count("tunnel_status_without_target") == 2


async def test_a_tunnel_poll_is_a_sign_of_life(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    for _ in range(8):
        await world.pass_s(15)
        await agent.tunnel_poll()
    assert len(world.controller.got("heartbeat")) >= 4


# --- acknowledgements -------------------------------------------------------------------------------------------------


async def test_heartbeat_acks_are_counted_by_their_heartbeat(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(70)
    assert world.metric("upstream_heartbeats_total", event="sent") == 3
    assert world.metric("upstream_heartbeats_total", event="acked") == 3
    world.controller.socket.says("heartbeat_ack", {}, "foreign")
    await world.settle()
    assert world.metric("upstream_heartbeats_total", event="acked") == 3
