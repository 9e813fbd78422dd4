"""The Go-like HTTP client of the simulated agents: what keeps a connection, what costs it, what is read how."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from devtools.agents.http_client import IDLE_TIMEOUT_S, Pool, Request, WireError
from tests.support.recording_server import Last, Recorded, RecordingServer, http

GET = Request("GET", "/x")
POST = Request("POST", "/x", (("User-Agent", "u"),), b"{}", success=frozenset({200, 204}), reads_success=False)


class Now:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def served(
    answer: Callable[[Recorded], bytes | None], path: str = ""
) -> AsyncIterator[tuple[Pool, RecordingServer]]:
    async with RecordingServer(answer) as server:
        pool = Pool(server.url + path, Now())
        try:
            yield pool, server
        finally:
            pool.close()


@pytest.mark.parametrize(
    "answer, connections",
    [
        (http(204), 1),
        (http(200), 1),
        (http(200, {"success": True}), 3),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 3),
        (http(500, {"error": "read, so that the connection lives"}), 1),
        (http(200, None, "Connection: close"), 3),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", 3),
    ],
)
async def test_a_success_with_an_unread_body_costs_the_connection(answer: bytes, connections: int) -> None:
    async with served(lambda call: answer) as (pool, server):
        for _ in range(3):
            await pool.exchange(POST)
        assert server.connections == pool.opened == connections


@pytest.mark.parametrize(
    "answer",
    [
        http(200, b"hello"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nT: v\r\n\r\n",
        http(200, gzip.compress(b"hello", mtime=0), "Content-Encoding: gzip"),
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http(200, b"hello"),
    ],
)
async def test_bodies_are_read_whole_and_the_connection_is_used_again(answer: bytes) -> None:
    async with served(lambda call: answer) as (pool, server):
        for _ in range(2):
            response = await pool.exchange(GET)
            assert (response.status, response.body, response.connection) == (200, b"hello", 1)
        assert server.connections == 1


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async with served(lambda call: Last(b"HTTP/1.1 200 OK\r\n\r\nhello")) as (pool, server):
        assert (await pool.exchange(GET)).body == b"hello"
        await pool.exchange(GET)
        assert server.connections == 2


async def test_base_url_is_concatenated_as_it_stands() -> None:
    async with served(lambda call: http(204), "/base/") as (pool, server):
        await pool.exchange(Request("GET", "/api/v1/health"))
        assert server.calls[0].path == "/base//api/v1/health"
        assert server.calls[0].headers[0] == ["Host", server.url.removeprefix("http://")]


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://h/", "http:///x"])
def test_a_url_without_scheme_or_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Pool(url, Now())


async def test_an_idle_connection_is_dropped_after_90_seconds() -> None:
    now = Now()
    async with RecordingServer(lambda call: http(204)) as server:
        pool = Pool(server.url, now)
        await pool.exchange(GET)
        now.now_s += IDLE_TIMEOUT_S
        await pool.exchange(GET)
        assert pool.opened == 1
        now.now_s += IDLE_TIMEOUT_S + 1
        await pool.exchange(GET)
        assert pool.opened == 2
        pool.close()


async def test_the_latest_connection_is_used_first_and_ten_are_kept() -> None:
    gate = asyncio.Event()

    async def answer(call: Recorded) -> bytes:
        await gate.wait()
        return http(204)

    async with RecordingServer(answer) as server:
        pool = Pool(server.url, Now())
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(pool.exchange(GET)) for _ in range(12)]
            await server.until(lambda: len(server.calls) == 12)
            gate.set()
        await server.until(lambda: server.closed == 2)
        kept = [call.result().connection for call in calls][:10]
        assert (await pool.exchange(GET)).connection == kept[-1]
        pool.close()


@pytest.mark.parametrize("request_, outcome", [(GET, 200), (POST, None)])
async def test_only_a_get_is_repeated_when_a_kept_connection_is_dead(request_: Request, outcome: int | None) -> None:
    answers = iter([http(200), None, http(200)])
    async with served(lambda call: next(answers)) as (pool, server):
        await pool.exchange(request_)
        if outcome is None:
            with pytest.raises(WireError, match=r"IncompleteReadError|ConnectionResetError"):
                await pool.exchange(request_)
        else:
            assert (await pool.exchange(request_)).status == outcome
        assert len(server.calls) == (2 if outcome is None else 3)


async def test_a_new_connection_that_dies_is_not_tried_again() -> None:
    async with served(lambda call: None) as (pool, server):
        with pytest.raises(WireError):
            await pool.exchange(GET)
        assert len(server.calls) == 1


@pytest.mark.parametrize("cut", [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
async def test_an_answer_cut_short_is_an_error_even_for_a_get(cut: bytes) -> None:
    answers = iter([http(200), Last(cut), http(200)])
    async with served(lambda call: next(answers)) as (pool, server):
        await pool.exchange(GET)
        with pytest.raises(WireError, match="IncompleteReadError"):
            await pool.exchange(GET)
        assert len(server.calls) == 2


async def test_a_connection_that_the_server_closed_while_idle_is_not_used() -> None:
    async with served(lambda call: Last(http(204))) as (pool, server):
        await pool.exchange(POST)
        async with asyncio.timeout(60):
            await pool._idle[0].reader.read()
        await pool.exchange(POST)
        assert server.connections == 2


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"SSH-2.0 x y\r\n\r\n", b"HTTP/1.1 abc X\r\n\r\n"])
async def test_what_is_not_http_is_an_error(answer: bytes) -> None:
    async with served(lambda call: answer) as (pool, _):
        with pytest.raises(WireError, match="malformed"):
            await pool.exchange(GET)


async def test_time_out_closes_the_connection() -> None:
    never = asyncio.Event()

    async def answer(call: Recorded) -> bytes:
        await never.wait()
        return http(204)

    async with RecordingServer(answer) as server:
        pool = Pool(server.url, Now())
        with pytest.raises(WireError, match="timeout"):
            await pool.exchange(Request("GET", "/x", timeout_s=0.01))
        assert not pool._idle
        assert not pool._busy
        never.set()


async def test_a_refused_connection_is_named() -> None:
    async with RecordingServer(lambda call: None) as server:
        url = server.url
    with pytest.raises(WireError, match="ConnectionRefusedError"):
        await Pool(url, Now()).exchange(GET)


async def test_an_aborted_connection_is_gone_at_once() -> None:
    async with served(lambda call: http(204)) as (pool, server):
        connection = await pool.dial()
        await connection.send(pool.encode(GET))
        connection.abort()
        await server.until(lambda: server.closed == 1)
        assert connection.stale
