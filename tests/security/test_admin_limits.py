"""The admin port is bounded: who reaches it must neither use up what agents need nor keep probes and operators out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shim.admin.connection_limit import MAX_CONNECTIONS, PROBES, STALL_S
from shim.admin.event_stream import MAX_READERS
from shim.admin.server import FILES
from tests.security.raw_client import Line, ask, request
from tests.support.processes import Shim, world

HEALTHZ = request("GET", "/healthz")


@pytest.fixture
async def shim(tmp_path: Path) -> AsyncIterator[Shim]:
    async with world(tmp_path, {"log": {"level": "debug"}}) as (it, _):
        yield await it.start()


async def healthz(shim: Shim) -> int:
    return (await ask(shim.admin, HEALTHZ)).status


async def test_idle_connections_make_room_for_probes_and_are_closed(shim: Shim) -> None:
    crowd = [await Line.to(shim.admin) for _ in range(2 * MAX_CONNECTIONS)]
    for line in crowd:
        await line.send(HEALTHZ)
    assert [await healthz(shim) for _ in range(MAX_CONNECTIONS)] == [200] * MAX_CONNECTIONS
    assert all([await line.closed() for line in crowd])
    for line in crowd:
        line.close()


@pytest.mark.parametrize(
    "start", [b"", b"GET /healthz HTTP/1.1\r\nX: y\r\n", b"POST /drain HTTP/1.1\r\nHost: localhost\r\n"]
)
async def test_silent_and_slow_connections_keep_no_probe_out(shim: Shim, start: bytes) -> None:
    crowd = [await Line.to(shim.admin) for _ in range(3 * MAX_CONNECTIONS)]
    for line in crowd:
        await line.send(start)
    assert await healthz(shim) == 200
    for line in crowd:
        line.close()


async def test_readers_that_do_not_read_are_dropped(shim: Shim) -> None:
    events = request("GET", "/events")
    readers = []
    for _ in range(MAX_READERS):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        host, _, port = shim.admin.removeprefix("http://").rpartition(":")
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        await asyncio.get_running_loop().sock_sendall(sock, events)
        readers.append(sock)
    async with asyncio.timeout(STALL_S * 4):
        while (reply := await ask(shim.admin, events)).status == 503:
            pass
    assert reply.status == 200
    for sock in readers:
        sock.close()


async def test_a_reader_that_takes_nothing_of_a_large_answer_is_dropped(shim: Shim) -> None:
    host, _, port = shim.admin.removeprefix("http://").rpartition(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect((host, int(port)))
        sock.sendall(request("GET", "/uplot.js"))
        await shim.line("a reader of the admin port that does not read is dropped")
    assert await shim.stop() == 0


MALFORMED = [
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic Y2FuYXJ5\x00\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\nAuthorization: Basic Y2FuYXJ5\r\n\r\n", 400),
    (b"Y2FuYXJ5 \x01\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nY2FuYXJ5 : x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nY2FuYXJ5: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: Y2FuYXJ5" + b"x" * 20_000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: Y2FuYXJ5" * 4000 + b"\r\n\r\n", 431),
    (request("GET", "/healthz", "Expect: Y2FuYXJ5"), 417),
    (request("GET", "/nothing", "Expect: Y2FuYXJ5"), 417),
    (request("POST", "/Y2FuYXJ5"), 404),
    (request("PUT", "/healthz"), 405),
    (request("POST", "/drain", "Transfer-Encoding: chunked"), 400),
    (request("GET", "/%zz%00Y2FuYXJ5"), 404),
]


async def test_malformed_requests_get_no_page_of_the_library(shim: Shim) -> None:
    for data, status in MALFORMED:
        reply = await ask(shim.admin, data)
        assert (reply.status, list(reply.json)) == (status, ["error"]), data[:80]
        assert reply.headers["server"] == "agent-shim"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert b"Y2FuYXJ5" not in reply.body
    assert await healthz(shim) == 200
    log = "\n".join(shim.lines)
    assert "Traceback" not in log
    assert "Y2FuYXJ5" not in log


async def test_head_is_get_without_a_body(shim: Shim) -> None:
    for path in (*sorted(PROBES), "/metrics", *FILES, "/status.json", "/events"):
        line = await Line.to(shim.admin)
        await line.send(request("HEAD", path) + HEALTHZ)
        head = await line.reply(head_only=True)
        assert head.status == 200, path
        assert (await line.reply()).json == {"status": "ok"}, "nothing came between them"
        line.close()


async def test_a_slow_head_is_cut_off_however_it_is_dripped(shim: Shim) -> None:
    line = await Line.to(shim.admin)
    for number in HEALTHZ[:-2]:
        await asyncio.sleep(0)
        await line.send(bytes([number]))
    assert (await line.reply()).status == 408
    line.close()
