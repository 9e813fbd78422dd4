"""Agents that speak WebSocket already and still have the shim's address, with real clients and real processes.

See docs/reference/protocol.md#5-an-agent-that-has-migrated-already.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.devtools.controller.test_third_party_clients import _go, _node, _python, _running
from tests.support.processes import TOKEN, Shim, world

PATH = "/api/v1/clusters/agent/ws"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
FAST = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": "off"}}
DEADLINE_S = 40.0
Prepare = Callable[[Path], Awaitable[list[str]]]
CLIENTS = [
    pytest.param(_python, id="python-websockets"),
    pytest.param(_node, id="node-ws", marks=pytest.mark.needs("node", "npm:ws")),
    pytest.param(_go, id="go-gorilla", marks=pytest.mark.needs("go")),
]


def ws_url(shim: Shim, path: str = PATH) -> str:
    return shim.url.replace("http:", "ws:", 1) + path


async def status_of(shim: Shim) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{shim.admin}/status.json") as response:
        found: dict[str, Any] = await response.json()
        return found


async def until_status(shim: Shim, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status for which `found` is true."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if found(status := await status_of(shim)):
                return status
            await asyncio.sleep(0.05)


# --- with the vendor's kind of clients and the development controller ---------------------------------------------


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["websocket", "http", "auto"])
@pytest.mark.parametrize("prepare", CLIENTS)
async def test_a_real_client_works_through_the_shim(prepare: Prepare, mode: str, tmp_path: Path) -> None:
    command = await prepare(tmp_path)
    more = {} if mode == "websocket" else {"fallback": {"url": "http://127.0.0.1:9"}}
    async with world(tmp_path, {**FAST, "mode": mode, **more}, "--ping-interval-s", "1") as (shim, controller):
        await shim.start()
        async with _running(*command, ws_url(shim), TOKEN, "agent-1", "cluster-1", "20") as told:
            [register] = await controller.until(type="register", direction="in")
            assert register["request_id"] == "req_1", "the agent's own, unchanged"
            [beat, *_] = await controller.until(type="heartbeat", direction="in")
            await controller.until(kind="pong_received")
            pushed = await controller.api.push({"cluster_id": beat["payload"]["cluster_id"], "type": "restart"})
            [result] = await controller.until(type="command_result", direction="in")
            assert result["payload"]["command_id"] == pushed["id"]
            status = await until_status(shim, lambda status: status["websocket_agents"]["connected"] == 1)
            [agent] = status["websocket_agents"]["items"]
            assert (agent["name"], agent["agent_id"], agent["accepted"]) == ("cluster-1", "agent-1", True)
            assert status["sessions"]["total"] == 0, "nothing of it is ours"
            said = [status["overall"]["code"], *(note["code"] for note in status["overall"]["notes"])]
            assert "needs_no_shim" in said
            await controller.control("POST", "/control/drop", {"how": "close"})
            [_, again] = await controller.until(2, type="register", direction="in")
            assert again["request_id"] == "req_2"
            await controller.until(after=again["n"], type="heartbeat", direction="in")
            assert await shim.stop() == 0
        events = [line["event"] for line in told]
        assert events.count("registered") >= 2
        assert "error" not in events
        assert not re.search(re.escape(TOKEN), "\n".join(shim.lines)), "the token is never logged"


async def test_the_legacy_session_of_the_same_identity_is_gone_as_soon_as_it_registers(tmp_path: Path) -> None:
    async with world(tmp_path, FAST) as (shim, controller), aiohttp.ClientSession(headers=AUTH) as http:
        await shim.start()
        base = f"{shim.url}/api/v1/clusters/agent"
        body = {"agent_id": "pod-1", "name": "prod"}
        async with http.post(f"{base}/register", json=body) as response:
            cluster_id = (await response.json())["cluster_id"]
        beat = {"agent_id": "pod-1", "status": "healthy"}
        assert (await http.post(f"{base}/{cluster_id}/heartbeat", json=beat)).status == 200
        await controller.until(type="heartbeat", direction="in")
        async with connect(f"{ws_url(shim)}?token={TOKEN}", compression=None) as agent:
            payload = {"agent_id": "pod-2", "name": "prod", "cluster_id": cluster_id}
            await agent.send(json.dumps({"type": "register", "request_id": "r", "payload": payload}))
            while json.loads(await agent.recv())["type"] != "register_success":
                pass
            status = await until_status(shim, lambda status: status["sessions"]["fresh"] == 0)
            assert status["sessions"]["items"][0]["migrated"]
            assert status["sessions"]["silent"] == 0, "it is not missed"
            assert status["websocket_agents"]["items"][0]["connected"]
            # The old process may still be there for a while, and is alive while it calls.
            assert (await http.post(f"{base}/{cluster_id}/heartbeat", json=beat)).status == 200
            status = await status_of(shim)
            assert (status["sessions"]["fresh"], status["sessions"]["items"][0]["migrated"]) == (1, False)
        status = await until_status(shim, lambda status: status["websocket_agents"]["connected"] == 0)
        assert status["websocket_agents"]["total"] == 1


async def test_a_handshake_whose_query_cannot_be_read_is_refused_and_is_no_defect(tmp_path: Path) -> None:
    async with world(tmp_path, {**FAST, "listen": {"auth": "required"}}) as (shim, _):
        await shim.start()
        for query, status in (("token=%FF", 401), (f"token={TOKEN}" + "&a=1" * 100, 400)):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"{ws_url(shim)}?{query}")
            assert refused.value.response.status_code == status
        assert "defect" not in "\n".join(shim.lines)


async def test_a_file_of_the_shim_that_cannot_be_used_is_named_in_the_answer(tmp_path: Path) -> None:
    upstream = {"url": "https://127.0.0.1:9", "ca_file": str(tmp_path / "none.pem")}
    async with world(tmp_path, {**FAST, "upstream": upstream}) as (shim, _):
        await shim.start()
        with pytest.raises(InvalidStatus) as refused:
            await connect(ws_url(shim), additional_headers={"Authorization": f"Bearer {TOKEN}"})
        assert refused.value.response.status_code == 502
        assert b"upstream.ca_file: No such file" in refused.value.response.body


async def test_a_refused_token_and_an_absent_controller_are_told_as_they_are(tmp_path: Path) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        for url, headers in (
            (f"{ws_url(shim)}?token=made-up-123", {}),
            (ws_url(shim), {"Authorization": "Bearer made-up-123"}),
        ):
            with pytest.raises(InvalidStatus) as refused:
                await connect(url, additional_headers=headers)
            assert refused.value.response.status_code == 401
        await controller.kill()
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"{ws_url(shim)}?token={TOKEN}")
        assert refused.value.response.status_code == 502
        with pytest.raises(InvalidStatus) as refused:
            await connect(ws_url(shim), origin="https://evil.test")  # type: ignore[arg-type]
        assert refused.value.response.status_code == 403
        assert "made-up-123" not in "\n".join(shim.lines)
        assert TOKEN not in "\n".join(shim.lines)


# --- frames, with a controller of the test's own ------------------------------------------------------------------


class Peer:
    """The controller's end: the connections that were made to it."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def serve(self, connection: ServerConnection) -> None:
        self.connections.put_nowait(connection)
        await connection.wait_closed()

    async def next(self) -> ServerConnection:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                connection = await self.connections.get()
                assert connection.request is not None
                if not connection.request.headers.get("User-Agent", "").startswith("agent-shim/"):
                    return connection


@asynccontextmanager
async def carried(tmp_path: Path, **upstream: Any) -> AsyncIterator[tuple[Shim, Peer]]:
    peer = Peer()
    async with serve(peer.serve, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None) as server:
        port = server.sockets[0].getsockname()[1]
        config = {"upstream": {"url": f"http://127.0.0.1:{port}", "token": TOKEN, **upstream}, "poll": {"hold": "off"}}
        async with Shim(tmp_path, config) as shim:
            await shim.start()
            yield shim, peer


@asynccontextmanager
async def pair(
    shim: Shim, peer: Peer, path: str = PATH, **options: Any
) -> AsyncIterator[tuple[ClientConnection, ServerConnection]]:
    given = {"compression": None, "max_size": None, "ping_interval": None, "additional_headers": AUTH, **options}
    async with connect(ws_url(shim, path), **given) as agent:
        yield agent, await peer.next()


async def test_the_handshake_is_passed_as_it_came(tmp_path: Path) -> None:
    async with carried(tmp_path) as (shim, peer):
        headers = {"Authorization": "Bearer own-token", "X-Agent": "7"}
        async with pair(shim, peer, f"{PATH}?token=a%2Fb&x=%20", additional_headers=headers) as (_, controller):
            request = controller.request
            assert request is not None
            assert request.path == f"{PATH}?token=a%2Fb&x=%20"
            assert (request.headers["Authorization"], request.headers["X-Agent"]) == ("Bearer own-token", "7")
            assert request.headers["User-Agent"].startswith("Python/")
        async with pair(shim, peer, "/ws?cluster_uuid=u-1") as (_, controller):
            assert controller.request is not None
            assert controller.request.path == "/ws?cluster_uuid=u-1"
        with pytest.raises(InvalidStatus) as refused:
            await connect(ws_url(shim, "/api/v1/other/ws"), additional_headers=AUTH)
        assert refused.value.response.status_code == 404


async def test_frames_go_both_ways_as_they_are(tmp_path: Path) -> None:
    frames: list[tuple[str | bytes, bool]] = [
        ("text", True),
        (b"\x00\xff binary", False),
        (b"caf\xe9: text that is no UTF-8", True),
        ("x" * 3_000_000, True),
        (b"", False),
        ('{"type":"command","payload":{"n":1e400}}{"type":"ping"}', True),
    ]
    async with carried(tmp_path) as (shim, peer), pair(shim, peer) as (agent, controller):
        for one, other in ((agent, controller), (controller, agent)):
            for data, text in frames:
                await one.send(data, text=text)
                got = await other.recv(decode=False)
                assert got == (data.encode() if isinstance(data, str) else data)
            waiter = await one.ping(b"payload")
            async with asyncio.timeout(DEADLINE_S):
                await waiter


@pytest.mark.parametrize("by_agent", [True, False])
@pytest.mark.parametrize(
    "code, reason", [(1000, ""), (1001, "going away"), (1012, ""), (4401, "ungültig"), (4999, "x" * 123)]
)
async def test_close_frames_are_passed(tmp_path: Path, by_agent: bool, code: int, reason: str) -> None:
    async with carried(tmp_path) as (shim, peer), pair(shim, peer) as (agent, controller):
        closer, other = (agent, controller) if by_agent else (controller, agent)
        closing = asyncio.ensure_future(closer.close(code, reason))
        with pytest.raises(ConnectionClosed):
            async with asyncio.timeout(DEADLINE_S):
                await other.recv()
        assert other.close_code == code
        assert other.close_reason == reason
        async with asyncio.timeout(DEADLINE_S):
            await closing
        assert closer.close_code == code, "the answer came back"


@pytest.mark.parametrize("by_agent", [True, False])
async def test_a_lost_side_is_lost_for_the_other(tmp_path: Path, by_agent: bool) -> None:
    async with carried(tmp_path) as (shim, peer), pair(shim, peer) as (agent, controller):
        lost, other = (agent, controller) if by_agent else (controller, agent)
        lost.transport.abort()
        with pytest.raises(ConnectionClosed):
            async with asyncio.timeout(DEADLINE_S):
                await other.recv()
        assert other.close_code == 1006
        await until_status(shim, lambda status: True)


@pytest.mark.parametrize("by_agent", [True, False])
async def test_a_message_above_the_bound_ends_the_connection(tmp_path: Path, by_agent: bool) -> None:
    async with carried(tmp_path, max_message_bytes=100_000) as (shim, peer), pair(shim, peer) as (agent, controller):
        sender, other = (agent, controller) if by_agent else (controller, agent)
        await sender.send(b"x" * 100_000)
        assert len(await other.recv()) == 100_000
        await sender.send(b"x" * 100_001)
        with pytest.raises(ConnectionClosed):
            async with asyncio.timeout(DEADLINE_S):
                await sender.recv()
        assert sender.close_code == 1009
        with pytest.raises(ConnectionClosed):
            async with asyncio.timeout(DEADLINE_S):
                await other.recv()


async def test_so_many_at_a_time_and_no_more(tmp_path: Path) -> None:
    async with carried(tmp_path, max_links=2) as (shim, peer), pair(shim, peer), pair(shim, peer):
        with pytest.raises(InvalidStatus) as refused:
            await connect(ws_url(shim), additional_headers=AUTH)
        assert refused.value.response.status_code == 503
        assert "Retry-After" in refused.value.response.headers


async def test_a_side_that_does_not_read_holds_the_other_up(tmp_path: Path) -> None:
    async with carried(tmp_path) as (shim, peer), pair(shim, peer) as (agent, controller):
        agent.transport.pause_reading()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await controller.send(b"x" * 1_000_000)
                sent += 1

        flooding = asyncio.ensure_future(flood())
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.5)
        assert sent < 64, "what waits is in the kernels and in bounded buffers"
        agent.transport.resume_reading()
        for _ in range(sent):
            assert len(await agent.recv()) == 1_000_000
        flooding.cancel()


async def test_a_stop_tells_both_sides(tmp_path: Path) -> None:
    async with carried(tmp_path) as (shim, peer), pair(shim, peer) as (agent, controller):
        stopping = asyncio.ensure_future(shim.stop())
        for side in (agent, controller):
            with pytest.raises(ConnectionClosed):
                async with asyncio.timeout(DEADLINE_S):
                    await side.recv()
            assert side.close_code == 1001
        assert await stopping == 0


async def test_a_request_for_the_path_that_is_no_handshake_is_refused(tmp_path: Path) -> None:
    async with carried(tmp_path) as (shim, _), aiohttp.ClientSession(headers=AUTH) as http:
        assert (await http.get(shim.url + PATH)).status == 404
        broken = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        host, port = shim.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as raw:
            head = "".join(f"{name}: {value}\r\n" for name, value in {**broken, **AUTH, "Host": "localhost"}.items())
            raw.sendall(f"GET {PATH} HTTP/1.1\r\n{head}\r\n".encode())
            assert (await asyncio.to_thread(raw.recv, 4096)).startswith(b"HTTP/1.1 400 ")


def masked(opcode: int, data: bytes) -> bytes:
    mask = b"\x01\x02\x03\x04"
    return bytes([0x80 | opcode, 0x80 | len(data)]) + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data))


def handshake(token: str = TOKEN) -> bytes:
    lines = [
        f"GET //api/v1/clusters/agent/ws?token={token} HTTP/1.1",
        "Host: localhost",
        "Upgrade: WebSocket",
        "Connection: keep-alive, Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==",
        "Sec-WebSocket-Extensions: permessage-deflate",
        "Sec-WebSocket-Protocol: agent, secret-in-a-subprotocol",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def test_frames_that_come_with_the_handshake_and_slow_ones_are_passed(tmp_path: Path) -> None:
    async with carried(tmp_path) as (shim, peer):
        host, port = shim.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        slow = masked(1, b"slowly")
        writer.write(handshake() + masked(1, b"first") + masked(2, b"second") + masked(9, b"p") + slow[:3])
        controller = await peer.next()
        assert [await controller.recv(), await controller.recv()] == ["first", b"second"]
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Extensions" not in head, "compression is not offered"
        assert await reader.readexactly(3) == b"\x8a\x01p"
        writer.write(slow[3:])
        assert await controller.recv() == "slowly"
        writer.write(b"\xff\xff\xff")
        assert await reader.readexactly(4) == b"\x88\x02\x03\xea", "a broken frame is answered with 1002"
        with pytest.raises(ConnectionClosed):
            await controller.recv()
        writer.close()
        assert "secret-in-a-subprotocol" not in "\n".join(shim.lines)
