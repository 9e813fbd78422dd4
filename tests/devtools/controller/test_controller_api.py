"""The WebSocket API without faults: handshake, answers, ids, the gateway, life signs."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any

import aiohttp
import pytest
import trustme
import websockets

from devtools.controller.faults import Gateway, Slow
from devtools.controller.history import EventKind, masked
from devtools.controller.server import DevController
from devtools.controller.state import Options, TokenPlace
from shim.protocol.rfc3339 import parse_rfc3339
from tests.support.wsagent import TOKEN, WsAgent, connected, registered


async def _refusal(controller: DevController, url: str | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of a refused handshake."""
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url or controller.ws_url, additional_headers=headers)
    response = refused.value.response
    return response.status_code, json.loads(response.body)


# --- the handshake ----------------------------------------------------------------------------------------------------


async def test_token_in_query_or_header(controller: DevController) -> None:
    async with websockets.connect(controller.ws_url + "?token=tok-2") as ws:
        assert (await WsAgent(ws).register())["status"] == "registered"
    async with websockets.connect(controller.ws_url, additional_headers={"Authorization": "Bearer tok-2"}) as ws:
        assert (await WsAgent(ws).register())["status"] == "re-registered"
    async with websockets.connect(
        controller.ws_url + "?token=tok-2", additional_headers={"Authorization": "bearer tok-2"}
    ):
        pass
    opened = controller.history.after(0, lambda event: event.kind is EventKind.OPENED)
    assert [event.detail["auth"] for event in opened] == [["query"], ["header"], ["header", "query"]]


@pytest.mark.parametrize(
    "query, headers, reason",
    [
        ("", {}, "missing token"),
        ("?token=", {}, "missing token"),
        ("?token=wrong", {}, "invalid token"),
        ("", {"Authorization": "Bearer wrong"}, "invalid token"),
        ("", {"Authorization": "Basic tok-1"}, "missing token"),
        ("?token=tok-1", {"Authorization": "Bearer wrong"}, "invalid token"),
        ("?token=tok-1", {"Authorization": "Bearer tok-2"}, "invalid token"),
    ],
)
async def test_bad_token_is_401(controller: DevController, query: str, headers: dict[str, str], reason: str) -> None:
    status, body = await _refusal(controller, controller.ws_url + query, **headers)
    assert status == 401
    assert body == {"success": False, "error": f"unauthorized: {reason}"}
    refused = await controller.wait_for(lambda event: event.kind is EventKind.REFUSED)
    assert refused.detail["status"] == 401
    assert "wrong" not in json.dumps(refused.to_json())


@pytest.mark.parametrize(
    "place, query, headers, good",
    [
        (TokenPlace.QUERY, "?token=tok-1", {}, True),
        (TokenPlace.QUERY, "", {"Authorization": "Bearer tok-1"}, False),
        (TokenPlace.HEADER, "", {"Authorization": "Bearer tok-1"}, True),
        (TokenPlace.HEADER, "?token=tok-1", {}, False),
    ],
)
async def test_token_place_can_be_demanded(place: TokenPlace, query: str, headers: dict[str, str], good: bool) -> None:
    async with DevController([TOKEN], options=Options(token_place=place)) as controller:
        url = controller.ws_url + query
        if good:
            async with websockets.connect(url, additional_headers=headers) as ws:
                await WsAgent(ws).register()
        else:
            assert (await _refusal(controller, url, **headers))[0] == 401


async def test_any_token_with_a_prefix() -> None:
    async with DevController([], options=Options(token_prefixes=("agent-",))) as controller:
        async with connected(controller, "agent-one") as one, connected(controller, "agent-two") as two:
            first, second = await one.register(), await two.register()
        assert first["cluster_id"] != second["cluster_id"], "each token is an owner of its own"
        assert first["workspace_id"] != second["workspace_id"]
        assert (await _refusal(controller, controller.ws_url + "?token=agent"))[0] == 401


async def test_what_is_no_handshake_gets_json(controller: DevController) -> None:
    url = controller.url
    path = "/api/v1/clusters/agent/ws?token=tok-1"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    async with aiohttp.ClientSession() as session:
        for method, target, headers, status in [
            ("GET", path, {}, 426),
            ("GET", path, upgrade, 400),
            ("POST", path, {}, 405),
            ("GET", "/api/v1/nothing", {}, 404),
        ]:
            async with session.request(method, url + target, headers=headers) as response:
                assert response.status == status
                body = await response.json()
                assert body["success"] is False
                assert body["error"]


async def test_base_path() -> None:
    async with DevController([TOKEN], options=Options(base_path="/edge/v2")) as controller:
        assert "/edge/v2/api/v1/clusters/agent/ws" in controller.ws_url
        async with registered(controller):
            pass
        wrong = controller.ws_url.replace("/edge/v2", "")
        assert (await _refusal(controller, wrong + "?token=tok-1"))[0] == 404


async def test_tls() -> None:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with DevController([TOKEN], options=Options(tls=server)) as controller:
        assert controller.url.startswith("https://")
        async with registered(controller, ssl=client) as agent:
            await agent.heartbeat()


# --- register ---------------------------------------------------------------------------------------------------------


async def test_register_success_has_all_fields(controller: DevController) -> None:
    async with connected(controller) as agent:
        payload = await agent.register("agent-9", "prod")
    assert set(payload) == {
        *("cluster_id", "cluster_uuid", "name", "status", "tunnel_url", "api_server", "workspace_id"),
        "registered_at",
    }
    assert payload["name"] == "prod"
    assert payload["status"] == "registered"
    assert type(payload["workspace_id"]) is int
    assert parse_rfc3339(payload["registered_at"]) is not None
    texts = ("cluster_id", "cluster_uuid", "tunnel_url", "api_server")
    assert all(isinstance(payload[name], str) and payload[name] for name in texts)


async def test_a_decoy_token_comes_only_where_it_is_asked_for() -> None:
    """Agents that speak WebSocket themselves may store it over their own token."""
    async with DevController([TOKEN], options=Options(decoy_token=True)) as other, connected(other) as agent:
        assert (await agent.register("agent-9", "prod"))["token"]


async def test_same_id_for_the_same_token_and_name(controller: DevController) -> None:
    async with connected(controller) as first:
        before = await first.register("agent-1", "prod")
        other = await first.register("agent-1", "staging")
    async with connected(controller) as second:
        again = await second.register("agent-after-restart", "prod")
    async with connected(controller, "tok-2") as foreign:
        foreign_one = await foreign.register("agent-1", "prod")
    assert again["cluster_id"] == before["cluster_id"]
    assert again["cluster_uuid"] == before["cluster_uuid"]
    assert again["status"] == "re-registered"
    assert len({before["cluster_id"], other["cluster_id"], foreign_one["cluster_id"]}) == 3


async def test_sent_cluster_id_comes_back(controller: DevController) -> None:
    """Also one that is unknown, and under another token: the tokens of an agent may change."""
    async with connected(controller) as agent:
        unknown = await agent.register(cluster_id="c-from-before")
        assert (unknown["cluster_id"], unknown["status"]) == ("c-from-before", "registered")
    async with connected(controller, "tok-2") as agent:
        moved = await agent.register(cluster_id="c-from-before")
        assert (moved["cluster_id"], moved["status"]) == ("c-from-before", "re-registered")
        assert (await agent.heartbeat())["type"] == "heartbeat_ack"


@pytest.mark.parametrize(
    "payload, text",
    [
        ({"name": "c"}, "missing required field: agent_id"),
        ({"agent_id": "a"}, "missing required field: name"),
        ({"agent_id": "a", "name": ""}, "missing required field: name"),
        ({"agent_id": 7, "name": "c"}, "invalid field: agent_id must be a string"),
        ({"agent_id": "a", "name": ["c"]}, "invalid field: name must be a string"),
        ({"agent_id": "a", "name": "c", "cluster_id": 7}, "invalid field: cluster_id must be a string"),
    ],
)
async def test_bad_register_is_an_error(controller: DevController, payload: dict[str, Any], text: str) -> None:
    async with connected(controller) as agent:
        answer = await agent.ask("register", payload, request_id="r-1")
        assert answer["type"] == "error"
        assert answer["request_id"] == "r-1"
        assert answer["payload"] == {"error": text}
        await agent.register()


# --- everything else --------------------------------------------------------------------------------------------------


async def test_heartbeat_ack_echoes_the_request_id(controller: DevController) -> None:
    async with registered(controller) as agent:
        plain = await agent.heartbeat()
        assert plain["type"] == "heartbeat_ack"
        assert "request_id" not in plain
        assert parse_rfc3339(plain["payload"]["received_at"]) is not None
        named = await agent.heartbeat(request_id="hb-7")
        assert named["request_id"] == "hb-7"
    presence = controller.state.registry.presence(agent.cluster_id)
    assert presence.heartbeats == 2
    assert presence.last_heartbeat["status"] == "available"


async def test_heartbeat_as_in_the_guide_has_no_ids(controller: DevController) -> None:
    async with registered(controller) as agent:
        answer = await agent.ask("heartbeat", {"tunnel_status": "connected", "status": "available"})
        assert answer["type"] == "heartbeat_ack"
    assert controller.state.registry.presence(agent.cluster_id).heartbeats == 1


async def test_heartbeat_with_a_saved_cluster_id_needs_no_register(controller: DevController) -> None:
    async with registered(controller) as agent:
        pass
    async with connected(controller) as again:
        again.cluster_id = agent.cluster_id
        assert (await again.heartbeat())["type"] == "heartbeat_ack"
        (command,) = await controller.push_command(cluster_id=agent.cluster_id)
        assert (await again.receive("command"))["payload"]["command_id"] == command.id


@pytest.mark.parametrize(
    "kind, payload, text",
    [
        ("heartbeat", {}, "cluster not registered"),
        ("heartbeat", {"agent_id": "agent-1"}, "cluster not registered"),
        ("heartbeat", {"cluster_id": "nobody"}, "cluster not found"),
        ("status", {"cluster_id": "nobody"}, "cluster not found"),
        ("command_result", {"command_id": "x", "cluster_id": "nobody"}, "cluster not found"),
    ],
)
async def test_unknown_cluster(controller: DevController, kind: str, payload: dict[str, Any], text: str) -> None:
    async with connected(controller) as agent:
        answer = await agent.ask(kind, payload, request_id="r-1")
        assert (answer["type"], answer["request_id"], answer["payload"]) == ("error", "r-1", {"error": text})


async def test_unknown_cluster_is_taken_where_that_is_wanted() -> None:
    lenient = Options(strict_clusters=False)
    async with DevController([TOKEN], options=lenient) as controller, connected(controller) as agent:
        assert (await agent.ask("heartbeat", {"cluster_id": "nobody"}))["type"] == "heartbeat_ack"
        assert (await agent.ask("heartbeat", {}))["type"] == "heartbeat_ack"


async def test_cluster_of_another_token_is_not_found(controller: DevController) -> None:
    async with registered(controller) as agent, connected(controller, "tok-2") as foreign:
        foreign.cluster_id = agent.cluster_id
        assert (await foreign.heartbeat())["payload"] == {"error": "cluster not found"}


async def test_one_connection_speaks_for_many(controller: DevController) -> None:
    async with connected(controller) as agent:
        ids = {name: (await agent.register(f"agent-{name}", name))["cluster_id"] for name in ("a", "b")}
        answer = await agent.ask("heartbeat", {"agent_id": "agent-a"})
        assert answer["type"] == "heartbeat_ack"
        assert (await agent.ask("heartbeat", {"agent_id": "agent-c"}))["type"] == "error"
    assert controller.state.registry.presence(ids["a"]).heartbeats == 1
    assert controller.state.registry.presence(ids["b"]).heartbeats == 0


async def test_status_is_acknowledged_but_is_no_heartbeat(controller: DevController) -> None:
    async with registered(controller) as agent:
        answer = await agent.ask("status", {"cluster_id": agent.cluster_id, "nodes": [1] * 100}, request_id="s")
        assert (answer["type"], answer["request_id"]) == ("heartbeat_ack", "s")
    assert controller.state.registry.presence(agent.cluster_id).heartbeats == 0


async def test_json_ping(controller: DevController) -> None:
    async with connected(controller) as agent:
        answer = await agent.ask("ping", None, request_id="p-1")
        assert (answer["type"], answer["request_id"]) == ("pong", "p-1")


@pytest.mark.parametrize(
    "frame, text",
    [
        ("not json", "message is not JSON"),
        (b"\xff\xfe", "message is not JSON"),
        ("[1]", "message must be an object"),
        ('{"payload":{}}', "missing required field: type"),
        ('{"type":7}', "missing required field: type"),
        ('{"type":"register","payload":[1]}', "payload must be an object"),
        ('{"type":"register","payload":{},"timestamp":"yesterday"}', "timestamp must be RFC 3339"),
        ('{"type":"dance","payload":{}}', "unknown message type"),
        ('{"type":"command_result","payload":{}}', "missing required field: command_id"),
        ('{"type":"command_ack"}', "missing required field: command_id"),
    ],
)
async def test_bad_message_is_an_error_and_costs_no_connection(
    controller: DevController, frame: str | bytes, text: str
) -> None:
    async with connected(controller) as agent:
        await agent.ws.send(frame)
        assert (await agent.receive("error"))["payload"] == {"error": text}
        await agent.register()


async def test_deep_nesting_does_no_harm(controller: DevController) -> None:
    async with registered(controller) as agent:
        deep = "[" * 300 + "]" * 300
        await agent.ws.send('{"type":"heartbeat","payload":{"metadata":' + deep + "}}")
        await agent.receive("heartbeat_ack")
        await agent.ws.send('{"type":"heartbeat","payload":{"metadata":' + "[" * 100_000 + "}}")
        assert (await agent.receive("error"))["type"] == "error"


async def test_messages_in_binary_frames_are_the_same(controller: DevController) -> None:
    async with connected(controller) as agent:
        await agent.ws.send(b'{"type":"ping","request_id":"b"}')
        assert (await agent.receive("pong"))["request_id"] == "b"
    async with DevController([TOKEN], options=Options(binary_frames=True)) as other, connected(other) as agent:
        await agent.send("ping")
        assert isinstance(await agent.frame(), bytes)


async def test_refusals_of_proxying_are_only_heard(controller: DevController) -> None:
    async with connected(controller) as agent:
        for kind in ("proxy_error", "proxy_websocket_close", "tcp_tunnel_close", "protocol_fallback", "pong"):
            await agent.send(kind, {"error": "no"}, request_id="x")
        assert (await agent.ask("ping"))["type"] == "pong", "none of them was answered"


async def test_credentials_are_masked_in_the_history(controller: DevController) -> None:
    async with connected(controller) as agent:
        await agent.register(k8s_service_token="cluster-admin", labels={"nested": [{"db_password": "pw"}]})
    register = await controller.received("register")
    assert register.payload["k8s_service_token"] == masked("cluster-admin")
    assert register.payload["labels"] == {"nested": [{"db_password": masked("pw")}]}
    shown = json.dumps([event.to_json() for event in controller.history.after(0)])
    assert "cluster-admin" not in shown
    assert TOKEN not in shown


async def test_handshake_headers_of_any_bytes_are_shown(controller: DevController) -> None:
    reader, writer = await asyncio.open_connection(*controller.listen)
    writer.write(b"GET /ws?x=%ff&token=nope HTTP/1.1\r\nHost: x\r\nUser-Agent: \xff\xfe\r\n\r\n")
    async with asyncio.timeout(60):
        assert b" 401 " in await reader.readline()
    refused = await controller.wait_for(lambda event: event.kind is EventKind.REFUSED)
    json.dumps(refused.to_json()).encode()
    refused.detail["user_agent"].encode()
    writer.close()
    await writer.wait_closed()


# --- life signs -------------------------------------------------------------------------------------------------------


async def test_pings_and_drops_a_peer_that_says_nothing() -> None:
    options = Options(ping_interval_s=0.05, silent_after_s=0.3, close_timeout_s=0.1)
    async with DevController([TOKEN], options=options) as controller:
        reader, writer = await asyncio.open_connection(*controller.listen)
        writer.write(
            b"GET /api/v1/clusters/agent/ws?token=tok-1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        closed = await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
        assert closed.detail == {"by": "controller", "how": "close", "code": 1001}
        pings = controller.history.after(0, lambda event: event.kind is EventKind.PING_SENT)
        assert len(pings) >= 3
        assert closed.monotonic_s - controller.history.after(0)[1].monotonic_s >= 0.3
        writer.close()
        await writer.wait_closed()
        del reader


async def test_pongs_keep_a_quiet_agent() -> None:
    options = Options(ping_interval_s=0.05, silent_after_s=0.2)
    async with DevController([TOKEN], options=options) as controller, connected(controller) as agent:
        pongs = 0
        for _ in range(10):
            pong = await controller.wait_for(lambda event: event.kind is EventKind.PONG_RECEIVED, after=pongs)
            pongs = pong.n
        assert (await agent.register())["cluster_id"]


async def test_pings_of_the_agent_are_answered(controller: DevController) -> None:
    async with connected(controller) as agent:
        await agent.ping()
    assert [e.kind for e in controller.history.after(0)].count(EventKind.PING_RECEIVED) == 1


async def test_end_by_the_agent_is_recorded(controller: DevController) -> None:
    async with connected(controller) as agent:
        await agent.ws.close(4001, "enough")
    closed = await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
    assert closed.detail == {"by": "agent", "how": "close", "code": 4001}
    assert agent.ws.close_code == 4001


async def test_too_big_a_message_ends_the_connection() -> None:
    async with DevController([TOKEN], options=Options(max_message_bytes=1000)) as controller:
        async with connected(controller) as agent:
            await agent.ws.send("x" * 2000)
            assert (await agent.end()).code == 1009
        closed = await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
        assert closed.detail == {"by": "controller", "how": "protocol_error", "code": 1009}


async def test_stop_says_going_away() -> None:
    controller = DevController([TOKEN])
    await controller.start()
    async with registered(controller) as agent:
        await controller.stop()
        assert (await agent.end()).code == 1001
    await controller.stop()
    async with DevController([TOKEN], port=controller.port) as again, registered(again) as agent:
        pass


async def test_stop_does_not_wait_for_a_peer_that_does_not_close() -> None:
    """Nor for one that a fault keeps busy."""
    controller = DevController([TOKEN], options=Options(close_timeout_s=0.1))
    await controller.start()
    async with connected(controller) as slow:
        controller.set_fault(Slow(latency_s=3600))
        await slow.send("ping")
        reader, writer = await asyncio.open_connection(*controller.listen)
        writer.write(
            b"GET /api/v1/clusters/agent/ws?token=tok-1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        async with asyncio.timeout(60):
            await controller.stop()
        writer.close()


async def test_stop_with_agents_that_come_back_at_once(controller: DevController) -> None:
    async def come_back() -> None:
        while True:
            async with connected(controller) as agent:
                await agent.end()

    tasks = [asyncio.create_task(come_back()) for _ in range(5)]
    await controller.wait_for(lambda event: event.kind is EventKind.OPENED and event.connection == 5)
    async with asyncio.timeout(60):
        await controller.stop()
    for task in tasks:
        with pytest.raises((OSError, websockets.WebSocketException)):
            await task


async def test_result_that_does_not_come(controller: DevController) -> None:
    async with registered(controller):
        (command,) = await controller.push_command()
        with pytest.raises(TimeoutError):
            await controller.result_of(command.id, timeout_s=0.02)
        with pytest.raises(TimeoutError):
            await controller.result_of("nobody", timeout_s=0.02)


# --- the gateway ------------------------------------------------------------------------------------------------------


async def test_gateway(controller: DevController) -> None:
    controller.set_fault(Gateway(count=1))
    async with connected(controller) as agent:
        payload = await agent.register()
        assert "gateway_ws_url" not in await agent.register("agent-2", "other")
    url = payload["gateway_ws_url"]
    assert url == f"ws://127.0.0.1:{controller.port}/gateway/ws"
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for ident in (payload["cluster_uuid"], payload["cluster_id"]):
        async with websockets.connect(f"{url}?cluster_uuid={ident}", additional_headers=bearer) as ws:
            agent = WsAgent(ws)
            assert (await agent.ask("heartbeat", {"status": "available"}))["type"] == "heartbeat_ack"
            assert (await agent.ask("register", {"agent_id": "a", "name": "c"}))["type"] == "error"
            (command,) = await controller.push_command(cluster_id=payload["cluster_id"])
            assert (await agent.receive("command"))["payload"]["command_id"] == command.id
    default_path = f"ws://127.0.0.1:{controller.port}/ws?cluster_uuid={payload['cluster_uuid']}"
    async with websockets.connect(default_path, additional_headers=bearer):
        pass


async def test_gateway_refuses(controller: DevController) -> None:
    async with registered(controller) as agent:
        pass
    url = f"ws://127.0.0.1:{controller.port}/gateway/ws?cluster_uuid="
    good, foreign = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": "Bearer tok-2"}
    assert (await _refusal(controller, f"{url}{agent.cluster_id}&token={TOKEN}"))[0] == 401
    assert (await _refusal(controller, url, **good))[0] == 400
    assert (await _refusal(controller, url + "nobody", **good))[0] == 404
    assert (await _refusal(controller, url + agent.cluster_id, **foreign))[0] == 404
