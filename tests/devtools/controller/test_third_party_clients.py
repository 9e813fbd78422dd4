"""The yardstick: agents written after the vendor's guide, on the libraries that it recommends, and a wscat session.

Each goes through connect, register, heartbeat, ping, forced disconnects and reconnects; none knows of the controller.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from devtools.controller.faults import How
from devtools.controller.history import EventKind
from devtools.controller.server import DevController
from devtools.controller.state import Options

CLIENTS = Path(__file__).parents[2] / "clients"
TOKEN = "tok-clients"
GUIDE_LINE = (
    '{"type":"register","payload":{"agent_id":"test-agent","name":"test-cluster"},"timestamp":"2025-10-16T12:00:00Z"}'
)


async def _python(_: Path) -> list[str]:
    return [sys.executable, str(CLIENTS / "python_agent.py")]


async def _node(_: Path) -> list[str]:
    return ["node", str(CLIENTS / "node_agent.js")]


def _gopath() -> str:
    """Where gorilla/websocket lies: by default where Debian's golang-github-gorilla-websocket-dev puts it."""
    gopath = os.environ.get("GOPATH", "/usr/share/gocode")
    if not Path(gopath, "src/github.com/gorilla/websocket").is_dir():
        if os.environ.get("AGENT_SHIM_REQUIRE_TOOLS") == "1":
            pytest.fail("needs gorilla/websocket in GOPATH")
        pytest.skip("needs gorilla/websocket in GOPATH")
    return gopath


async def _go(folder: Path) -> list[str]:
    gopath = _gopath()
    program = folder / "go_agent"
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": gopath}
    build = await asyncio.create_subprocess_exec(
        "go", "build", "-o", str(program), ".", cwd=CLIENTS / "go_agent", env=environment
    )
    assert await build.wait() == 0
    return [str(program)]


@asynccontextmanager
async def _running(*command: str) -> AsyncIterator[list[dict[str, str]]]:
    """The lines that a client prints, complete when the block has ended."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    told: list[dict[str, str]] = []
    try:
        yield told
    finally:
        process.terminate()
        stdout, _ = await process.communicate()
        told += map(json.loads, stdout.decode().splitlines())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(_python, id="python-websockets"),
        pytest.param(_node, id="node-ws", marks=pytest.mark.needs("node", "npm:ws")),
        pytest.param(_go, id="go-gorilla", marks=pytest.mark.needs("go")),
    ],
)
async def test_agent_after_the_guide(prepare, tmp_path: Path) -> None:
    command = await prepare(tmp_path)
    async with (
        DevController([TOKEN], options=Options(ping_interval_s=0.05)) as controller,
        _running(*command, controller.ws_url, TOKEN, "agent-1", "cluster-1", "20") as told,
    ):
        register = await controller.received("register", timeout_s=20)
        assert register.request_id == "req_1"
        heartbeat = await controller.received("heartbeat", after=register.n)
        cluster_id = heartbeat.payload["cluster_id"]
        assert controller.state.registry.get(cluster_id).name == "cluster-1"
        await controller.received("heartbeat", after=heartbeat.n)

        await controller.wait_for(lambda event: event.kind is EventKind.PONG_RECEIVED)
        ping = await controller.send(message={"type": "ping", "request_id": "json-ping"})
        pong = await controller.received("pong", after=ping.n)
        assert pong.request_id == "json-ping"
        (pushed,) = await controller.push_command(agent_id="agent-1", type="restart")
        assert (await controller.result_of(pushed.id))["output"] == "done"

        for times, how in enumerate(How, start=2):
            controller.drop(how)
            again = await controller.received("register", after=controller.history.last_n)
            assert again.request_id == f"req_{times}"
            beat = await controller.received("heartbeat", after=again.n)
            assert beat.payload["cluster_id"] == cluster_id
    statuses = [line["status"] for line in told if line["event"] == "registered"]
    assert statuses == ["registered", "re-registered", "re-registered", "re-registered"]
    events = [line["event"] for line in told]
    assert events.count("connected") == 4
    assert events.count("closed") >= 3
    assert "heartbeat_ack" in events
    assert "error" not in events


@pytest.mark.needs("node", "npm:wscat")
async def test_wscat_with_the_guides_line(controller: DevController) -> None:
    process = await asyncio.create_subprocess_exec(
        "node",
        str(CLIENTS / "node_modules" / "wscat" / "bin" / "wscat"),
        *("-c", f"{controller.ws_url}?token=tok-1", "-x", GUIDE_LINE, "-w", "-1"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            answer = json.loads(await process.stdout.readline())
        assert answer["type"] == "register_success"
        assert answer["payload"]["name"] == "test-cluster"
    finally:
        process.kill()
        await process.communicate()


async def test_raw_session_with_the_guides_line(controller: DevController) -> None:
    """Byte by byte, with nobody's library: what goes over the wire is RFC 6455 and the documented JSON."""
    reader, writer = await asyncio.open_connection(*controller.listen)
    key = base64.b64encode(b"0123456789abcdef").decode()
    writer.write(
        f"GET /api/v1/clusters/agent/ws?token=tok-1 HTTP/1.1\r\nHost: {controller.listen[0]}\r\n"
        f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n".encode()
    )
    async with asyncio.timeout(60):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 101 ")
        assert "sec-websocket-extensions" not in head

        line = GUIDE_LINE.encode()
        mask = b"\x01\x02\x03\x04"
        masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(line))
        writer.write(bytes([0x81, 0x80 | len(line)]) + mask + masked)
        first, size = await reader.readexactly(2)
        assert first == 0x81, "one whole text frame"
        assert size == 126, "unmasked, with a 16 bit size"
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        answer = json.loads(await reader.readexactly(size))
    assert answer["type"] == "register_success"
    assert "request_id" not in answer
    assert answer["payload"] | {"name": "test-cluster", "status": "registered"} == answer["payload"]
    writer.close()
    await writer.wait_closed()
    closed = await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
    assert closed.detail == {"by": "agent", "how": "lost", "code": 1006}
