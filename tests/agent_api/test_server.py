"""The legacy server as HTTP: routes, bodies, limits, errors, headers."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib
from collections.abc import Callable

import pytest

from shim.config.settings import Listen
from shim.core.agent_calls import AgentCall, Failed, HeartbeatCall, OfferedCommand, PollCall
from shim.core.agent_calls import Commands as CommandList
from shim.ports import Caller, CallResult, ProxyRequest, ProxyResponse
from tests.support.frontend import HEALTH, POLL, Agent, Board, House, Reply, get, offering, plain_answer, post, running

HEARTBEAT = "/api/v1/clusters/agent/c1/heartbeat"
STATUS = "/api/v1/agents/a1/status"


def assert_error(reply: Reply, status: int, text: str) -> None:
    assert reply.status == status
    assert reply.json == {"success": False, "error": text}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]


# --- replies ------------------------------------------------------------------------------------------------------


async def test_a_call_goes_through_the_dialect_and_back() -> None:
    async with running() as house:
        reply = await house.ask(post("//api/v1/clusters/agent/c%2D1/heartbeat?x=1", b'{"agent_id":"a"}'))
        assert (reply.status, reply.json) == (200, {"success": True})
        call = house.board.calls[0]
        assert isinstance(call, HeartbeatCall)
        assert (call.target.ident, call.agent_id) == ("c-1", "a")
        assert house.count("requests_total", dialect="clusters_agent", operation="heartbeat", status="200") == 1
        assert house.count("request_duration_seconds_count", dialect="clusters_agent", operation="heartbeat") == 1


async def test_go_gets_204_without_a_body_and_keeps_its_connection() -> None:
    async with running() as house:
        agent = await house.agent()
        for _ in range(2):
            await agent.send(post(HEARTBEAT, b"{}", "User-Agent: Go-http-client/1.1"))
            reply = await agent.reply()
            assert (reply.status, reply.body) == (204, b"")
            assert not {"content-length", "content-type", "transfer-encoding", "connection"} & set(reply.headers)


async def test_a_failed_outcome_is_rendered_with_retry_after() -> None:
    board = Board()

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        return CallResult(Failed(503, "not now", retry_after_s=7))

    board.script = script
    async with running(board=board) as house:
        reply = await house.ask(POLL)
        assert_error(reply, 503, "not now")
        assert reply.headers["retry-after"] == "7"


async def test_static_headers_and_their_change() -> None:
    current = {"Deprecation": "@1767225600", "Link": '<https://h/a>; rel="deprecation"', "Bad\r\n": "x\r\nInjected: 1"}
    async with running(static_headers=lambda: current) as house:
        for request in (HEALTH, get("/nope"), post(HEARTBEAT, b"{}", "User-Agent: Go-http-client/1.1")):
            headers = (await house.ask(request)).headers
            assert headers["deprecation"] == "@1767225600"
            assert headers["link"] == '<https://h/a>; rel="deprecation"'
            assert "injected" not in headers
        current = {"Sunset": "Thu, 01 Jan 2026 00:00:00 GMT"}
        headers = (await house.ask(HEALTH)).headers
        assert headers["sunset"] == "Thu, 01 Jan 2026 00:00:00 GMT"
        assert "deprecation" not in headers


@pytest.mark.parametrize("given,kept", [("abc-123", True), ("a b", False), ("x" * 129, False), ("é", False)])
async def test_request_ids(given: str, kept: bool) -> None:
    async with running() as house:
        ids = [(await house.ask(get("/api/v1/health", f"X-Request-Id: {given}"))).headers["x-request-id"]]
        ids.append((await house.ask(HEALTH)).headers["x-request-id"])
    assert (ids[0] == given) is kept
    assert len(set(ids)) == 2


# --- routing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes,status,text,allow",
    [
        (get("/api/v1/nope"), 404, "no such endpoint", None),
        (get("/"), 404, "no such endpoint", None),
        (get("*", method="OPTIONS"), 404, "no such endpoint", None),
        (get(HEARTBEAT), 405, "method not allowed", "POST"),
        (post("/api/v1/health"), 405, "method not allowed", "GET, HEAD"),
        (get(HEARTBEAT, method="OPTIONS"), 405, "method not allowed", "POST"),
        (get("/api/v1/agents/%2e%2e/commands"), 400, "invalid id", None),
        (get("/api/v1/agents/a%2fb/commands"), 400, "invalid id", None),
        (get("/api/v1/agents/a%00b/commands"), 400, "invalid id", None),
        (get("/api/v1/agents/" + "x" * 4096 + "/commands"), 400, "invalid id", None),
    ],
)
async def test_what_is_not_served(request_bytes: bytes, status: int, text: str, allow: str | None) -> None:
    async with running() as house:
        reply = await house.ask(request_bytes)
        assert_error(reply, status, text)
        assert reply.headers.get("allow") == allow
        assert house.count("requests_total", dialect="", operation="", status=str(status)) == 1
        assert house.count("bad_requests_total", reason="route") == 1
    assert house.board.calls == []


async def test_bytes_in_the_path_that_are_not_utf8() -> None:
    async with running() as house:
        reply = await house.ask(b"GET /api/v1/agents/\xff/commands HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reply.status == 400
        assert reply.json["success"] is False


async def test_head_shows_health_but_never_drains() -> None:
    async with running() as house:
        reply = await house.ask(get("/api/v1/health", method="HEAD"))
        assert (reply.status, reply.headers["content-length"]) == (200, "20")
        reply = await house.ask(get("/api/v1/clusters/agent/c1/poll", method="HEAD"))
        assert (reply.status, reply.headers["allow"]) == (405, "GET")
    assert not any(isinstance(call, PollCall) for call in house.board.calls)


async def test_base_path_and_absolute_form() -> None:
    async with running(Listen(port=0, base_path="/base")) as house:
        for target in ("/base/api/v1/health", "/base//api/v1/health", "http://localhost/base/api/v1/health?x=1"):
            assert (await house.ask(get(target))).status == 200


async def test_connect_gets_an_answer_and_the_door() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\nwhatever follows")
        assert (await agent.reply()).status == 405
        await agent.closed_by_peer()


async def test_an_upgrade_is_not_taken() -> None:
    async with running() as house:
        agent = await house.agent()
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
        await agent.send(get("/api/v1/health", *upgrade) + HEALTH)
        assert [(await agent.reply()).status for _ in range(2)] == [200, 200]


async def test_old_and_closing_clients() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(b"GET /api/v1/health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert (await agent.reply()).headers["connection"] == "keep-alive"
        await agent.send(b"GET /api/v1/health HTTP/1.0\r\n\r\n")
        assert (await agent.reply()).headers["connection"] == "close"
        assert await agent.closed_by_peer() == b""


async def test_a_burst_of_pipelined_requests_is_answered_in_order() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(b"".join(get("/api/v1/health", f"X-Request-Id: {n}") for n in range(100)))
        assert [(await agent.reply()).headers["x-request-id"] for _ in range(100)] == [str(n) for n in range(100)]
    assert len(house.board.arrivals_s) == 100


# --- bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body,headers",
    [
        (b'{"agent_id":"a"}', ("Content-Type: text/plain",)),
        (gzip.compress(b'{"agent_id":"a"}', mtime=0), ("Content-Encoding: gzip",)),
        (zlib.compress(b'{"agent_id":"a"}'), ("Content-Encoding: deflate",)),
        (zlib.compress(b'{"agent_id":"a"}', wbits=-15), ("Content-Encoding: deflate",)),
        (gzip.compress(b'{"agent_id":"a"}', mtime=0), ("Content-Encoding: X-GZIP",)),
        (gzip.compress(b'{"agent_id"', mtime=0) + gzip.compress(b':"a"}', mtime=0), ("Content-Encoding: gzip",)),
        (b'{"agent_id":"a"}', ("Content-Encoding: identity",)),
    ],
    ids=["plain", "gzip", "deflate", "deflate-raw", "x-gzip", "gzip-members", "identity"],
)
async def test_bodies_are_decoded(body: bytes, headers: tuple[str, ...]) -> None:
    async with running() as house:
        assert (await house.ask(post(HEARTBEAT, body, *headers))).status == 200
        call = house.board.calls[0]
        assert isinstance(call, HeartbeatCall)
        assert call.agent_id == "a"


async def test_a_chunked_body_in_pieces() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(f"POST {HEARTBEAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in (b'{"agent', b'_id":"', b'a"}'):
            await agent.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await house.ask(get("/nope"))
        await agent.send(b"0\r\n\r\n")
        assert (await agent.reply()).status == 200
        await agent.send(HEALTH)
        assert (await agent.reply()).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nonsense",
        b"   ",
        b'{"a":1}x',
        b'{"agent_id":"\\ud8"}',
        b"[" * 100_000,
        b"1" + b"0" * 5000,
        b"NaN",
    ],
)
async def test_malformed_json(body: bytes) -> None:
    async with running() as house:
        assert_error(await house.ask(post(HEARTBEAT, body)), 400, "the body is not valid JSON")
        assert house.count("bad_requests_total", reason="body") == 1
        assert house.count("requests_total", dialect="clusters_agent", operation="heartbeat", status="400") == 1


async def test_bytes_that_are_no_utf8_are_read_as_go_reads_them() -> None:
    async with running() as house:
        for body in (b'{"agent_id":"a","status":"caf\xe9"}', b'\xef\xbb\xbf{"agent_id":"a"}', b'{"agent_id":"\xff"}'):
            assert (await house.ask(post(HEARTBEAT, body))).status < 300
        assert house.count("invalid_characters_total", source="agent") == 2
        assert house.count("bad_requests_total", reason="body") == 0


async def test_wrong_types_are_the_dialects_business_and_no_body_is_none() -> None:
    async with running() as house:
        for body in (b"[]", b"null", b"7", b""):
            assert (await house.ask(post("/api/v1/clusters/agent/register", body))).status == 400
        assert house.count("bad_requests_total", reason="call") == 4


async def test_a_body_on_a_poll_is_read_and_ignored() -> None:
    async with running() as house:
        agent = await house.agent()
        poll = POLL.replace(b"\r\n\r\n", b"\r\nContent-Length: 7\r\n\r\nGET / x")
        await agent.send(poll + HEALTH)
        assert [(await agent.reply()).status for _ in range(2)] == [200, 200]


LIMITS = Listen(port=0, max_body_bytes=1000, max_status_body_bytes=5000)


async def test_a_body_at_the_limit_passes() -> None:
    async with running(LIMITS) as house:
        assert (await house.ask(post(HEARTBEAT, b'{"a":"' + b"x" * 992 + b'"}'))).status == 200
        assert (await house.ask(post(STATUS, b'{"a":"' + b"x" * 4992 + b'"}'))).status == 200


@pytest.mark.parametrize("path,size", [(HEARTBEAT, 1001), (STATUS, 5001), (HEARTBEAT, 3_000_000)])
async def test_a_body_too_large_is_refused_by_its_length(path: str, size: int) -> None:
    async with running(LIMITS) as house:
        agent = await house.agent()
        await agent.send(post(path, b"x" * size))
        reply = await agent.reply()
        assert_error(reply, 413, "the body is too large")
        assert reply.headers["connection"] == "close"
        await agent.closed_by_peer()
    assert house.board.calls == []


async def test_a_chunked_body_too_large() -> None:
    async with running(LIMITS) as house:
        agent = await house.agent()
        await agent.send(f"POST {HEARTBEAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await agent.send(b"258\r\n" + b"x" * 600 + b"\r\n")
        await agent.send(b"258\r\n" + b"x" * 600 + b"\r\n")
        assert_error(await agent.reply(), 413, "the body is too large")
        await agent.closed_by_peer()


async def test_a_gzip_bomb_is_stopped_before_it_is_inflated() -> None:
    bomb = gzip.compress(b'{"a":"' + b"x" * 60_000_000 + b'"}', 9)
    async with running(Listen(port=0)) as house:
        agent = await house.agent()
        await agent.send(post(HEARTBEAT, bomb, "Content-Encoding: gzip"))
        assert_error(await agent.reply(), 413, "the body is too large")
        await agent.closed_by_peer()
        assert (await house.ask(HEALTH)).status == 200


@pytest.mark.parametrize(
    "body,headers",
    [
        (b"this is not gzip", ("Content-Encoding: gzip",)),
        (b"{}", ("Content-Encoding: gzip",)),
        (b"\x00\x01\x02\x03", ("Content-Encoding: deflate",)),
        (gzip.compress(b'{"agent_id":"a"}', mtime=0)[:-9], ("Content-Encoding: x-gzip",)),
        (gzip.compress(b"{}", mtime=0) + b"no member", ("Content-Encoding: gzip",)),
    ],
)
async def test_bodies_that_cannot_be_inflated(body: bytes, headers: tuple[str, ...]) -> None:
    async with running() as house:
        reply = await house.ask(post(HEARTBEAT, body, *headers))
        assert (reply.status, reply.json["success"]) == (400, False)
    assert house.board.calls == []


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress"])
async def test_other_content_codings_are_refused(coding: str) -> None:
    async with running() as house:
        reply = await house.ask(post(HEARTBEAT, b"{}", f"Content-Encoding: {coding}"))
        assert_error(reply, 415, "the content coding is not accepted: use gzip or none")
    assert house.board.calls == []


async def test_a_broken_chunk() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(
            f"POST {HEARTBEAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n".encode()
        )
        await house.ask(get("/nope"))
        await agent.send(b"this is no chunk size\r\n")
        reply = await agent.reply()
        assert (reply.status, reply.json["success"]) == (400, False)
        await agent.closed_by_peer()


async def test_a_waiting_agent_is_told_to_continue() -> None:
    async with running(LIMITS) as house:
        agent = await house.agent()
        head = f"POST {HEARTBEAT} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        await agent.send(head.encode())
        assert (await agent.reply()).status == 100
        await agent.send(b"{}")
        assert (await agent.reply()).status == 200
        await agent.send(head.replace("Length: 2", "Length: 1001").encode())
        assert (await agent.reply()).status == 413, "it is spared sending the body"


async def test_an_unknown_expectation() -> None:
    async with running() as house:
        agent = await house.agent()
        head = f"POST {HEARTBEAT} HTTP/1.1\r\nHost: localhost\r\nExpect: miracles\r\nContent-Length: 2\r\n\r\n"
        await agent.send(head.encode())
        assert (await agent.reply()).status == 417


# --- time ---------------------------------------------------------------------------------------------------------


async def test_a_slow_head() -> None:
    async with running(Listen(port=0, header_timeout_s=0.2)) as house:
        agent = await house.agent()
        await agent.send(HEALTH[:10])
        await house.ask(get("/nope"))
        await agent.send(HEALTH[10:20])  # a later byte gains no time
        assert_error(await agent.reply(), 408, "the request did not arrive in time")
        await agent.closed_by_peer()
        assert house.count("bad_requests_total", reason="head") == 1


async def test_a_slow_pipelined_head_does_not_cost_the_reply_before_it() -> None:
    board = Board()
    go = asyncio.Event()

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        await go.wait()
        return await plain_answer(caller, call)

    board.script = script
    async with running(Listen(port=0, header_timeout_s=0.1), board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("call")
        await agent.send(b"GET /")
        async with asyncio.timeout(60):
            while not house.count("bad_requests_total", reason="head"):
                await house.ask(get("/nope"))
        go.set()
        reply = await agent.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        await agent.closed_by_peer()


async def test_idle_connections_and_stray_empty_lines_are_no_slow_heads() -> None:
    async with running(Listen(port=0, header_timeout_s=0.05)) as house:
        idle, agent = await house.agent(), await house.agent()
        await agent.send(post(HEARTBEAT))
        await agent.reply()
        await agent.send(b"\r\n")
        await (await house.agent()).send(b"GET")
        async with asyncio.timeout(60):
            while not house.count("bad_requests_total", reason="head"):
                await house.ask(get("/nope"))
        for connection in (idle, agent):
            await connection.send(HEALTH)
            assert (await connection.reply()).status == 200
        assert house.count("bad_requests_total", reason="head") == 1


async def test_a_connection_that_never_speaks_is_closed() -> None:
    async with running(Listen(port=0, keepalive_s=0.1)) as house:
        agent = await house.agent()
        assert await agent.closed_by_peer() == b""
        assert house.count("bad_requests_total", reason="head") == 0


async def test_a_slow_body() -> None:
    async with running(Listen(port=0, body_timeout_s=0.2)) as house:
        agent = await house.agent()
        await agent.send(post(HEARTBEAT, b"{}" + b" " * 98)[:-50])
        assert_error(await agent.reply(), 408, "the body did not arrive in time")
        await agent.closed_by_peer()
    assert house.board.calls == []


async def test_idle_connections_are_closed() -> None:
    async with running(Listen(port=0, keepalive_s=0.1)) as house:
        agent = await house.agent()
        await agent.send(HEALTH)
        await agent.reply()
        assert await agent.closed_by_peer() == b""


async def test_the_first_byte_counts_as_the_arrival() -> None:
    async with running() as house:
        loop = asyncio.get_running_loop()
        agent = await house.agent()
        before_s = loop.time()
        await agent.send(POLL[:10])
        await house.ask(HEALTH)
        seen_s = loop.time()
        while (between_s := loop.time()) == seen_s:
            await house.ask(get("/nope"))  # uvloop counts milliseconds
        await agent.send(POLL[10:])
        await agent.reply()
    assert before_s <= house.board.arrivals_s[1] < between_s


# --- the parser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage,status",
    [
        (b"secret-canary\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nsecret-canary: 1\r\n\r\n", 400),
        (b"BREW /secret-canary HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nsecret-canary\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: secret-canary\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: secret-canary\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\nX: secret-canary\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /secret-canary" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: secret-canary" + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: secret-canary\r\n" * 200 + b"\r\n", 400),
    ],
)
async def test_malformed_requests(garbage: bytes, status: int, caplog: pytest.LogCaptureFixture) -> None:
    text = "malformed request" if status == 400 else "a line of the request is too long"
    with caplog.at_level(logging.DEBUG):
        async with running() as house:
            agent = await house.agent()
            await agent.send(garbage)
            reply = await agent.reply()
            assert_error(reply, status, text)
            assert reply.headers["connection"] == "close"
            await agent.closed_by_peer()
            assert house.count("bad_requests_total", reason="http") == 1
    assert "canary" not in caplog.text


async def test_garbage_behind_a_request_waits_for_its_reply() -> None:
    async with running() as house:
        go, agent = await _held(house)
        await agent.send(b"garbage\r\n\r\n")
        await house.ask(get("/nope"))
        go.set()
        assert [(await agent.reply()).status for _ in range(2)] == [200, 400]
        await agent.closed_by_peer()


# --- defects ------------------------------------------------------------------------------------------------------


async def test_a_defect_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    board = Board()

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        raise RuntimeError("inner-detail")

    board.script = script
    async with running(board=board) as house:
        agent = await house.agent()
        for _ in range(2):
            await agent.send(POLL)
            assert_error(await agent.reply(), 500, "internal error")
        assert house.count("internal_errors_total", part="frontend") == 2
    assert "inner-detail" in caplog.text
    assert "clusters_agent" in caplog.text


async def test_a_reply_that_cannot_be_encoded_gives_its_commands_back() -> None:
    board = Board()

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        poison = OfferedCommand("id", "type", {"x": "\ud800"}, "2026-01-01T00:00:00Z")
        return CallResult(CommandList((poison,), 5), receipt="receipt")

    board.script = script
    async with running(board=board) as house:
        assert_error(await house.ask(POLL), 500, "internal error")
    assert board.steps == ["call", "unwritten"]


# --- many, few, none ----------------------------------------------------------------------------------------------


async def test_too_many_connections() -> None:
    async with running(Listen(port=0, max_connections=2)) as house:
        first, second = await house.agent(), await house.agent()
        await first.send(HEALTH)
        await first.reply()
        await second.send(HEALTH)
        await second.reply()
        assert house.count("connections") == 2
        third = await house.agent()
        assert_error(await third.reply(), 503, "too many connections")
        await third.closed_by_peer()
        assert house.count("bad_requests_total", reason="connections") == 1
        second.close()
        async with asyncio.timeout(60):
            while house.count("connections") > 1:
                await first.send(HEALTH)
                await first.reply()
        assert (await house.ask(HEALTH)).status == 200


async def _held(house: House) -> tuple[asyncio.Event, Agent]:
    go = asyncio.Event()

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        await go.wait()
        return await offering()(caller, call)

    house.board.script = script
    agent = await house.agent()
    before = len(house.board.calls)
    await agent.send(POLL)
    await house.board.until("call", before + 1)
    return go, agent


async def test_stop_lets_requests_under_way_finish() -> None:
    async with running() as house:
        idle = await house.agent()
        await idle.send(HEALTH)
        await idle.reply()
        go, agent = await _held(house)
        stopping = asyncio.create_task(house.frontend.stop())
        assert await idle.closed_by_peer() == b""
        go.set()
        reply = await agent.reply()
        assert reply.headers["connection"] == "close"
        assert json.loads(reply.body)["commands"][0]["id"] == "cmd-1"
        agent.close()
        await stopping
        with pytest.raises(ConnectionRefusedError):
            await house.agent()
    assert house.board.steps[-2:] == ["written", "clean"]


async def test_stop_does_not_wait_for_ever() -> None:
    async with running() as house:
        _, agent = await _held(house)
        await house.frontend.stop(0.2)
        await house.board.until("cancelled")
        assert await agent.closed_by_peer() == b""
        await house.frontend.stop()


# --- what is under way at a time ----------------------------------------------------------------------------------


class Gate:
    """A script whose answers wait until the gate is opened."""

    def __init__(self, board: Board) -> None:
        self.open = asyncio.Event()
        board.script = self._script

    async def _script(self, caller: Caller, call: AgentCall) -> CallResult:
        await self.open.wait()
        return await plain_answer(caller, call)


async def test_one_agent_has_so_many_requests_at_a_time_and_others_theirs() -> None:
    board = Board()
    gate = Gate(board)
    async with running(Listen(port=0, max_in_flight_per_session=2), board) as house:
        waiting = [await house.agent() for _ in range(3)]
        await waiting[0].send(POLL)
        await waiting[1].send(post(HEARTBEAT))
        await waiting[2].send(get("/api/v1/clusters/agent/c2/poll"))
        await board.until("call", 3)
        reply = await house.ask(POLL)
        assert_error(reply, 429, "too many requests of this agent at a time")
        assert reply.headers["retry-after"] == "1"
        assert house.count("bad_requests_total", reason="in_flight") == 1
        gate.open.set()
        for agent in waiting:
            assert (await agent.reply()).status == 200
        assert (await house.ask(POLL)).status == 200
        assert len(house.frontend._handler._in_flight) == 0


async def test_an_agent_that_hangs_up_is_not_counted_any_more() -> None:
    board = Board()
    Gate(board)
    async with running(Listen(port=0, max_in_flight_per_session=1), board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("call")
        agent.close()
        await board.until("cancelled")
        again = await house.agent()
        await again.send(POLL)
        await board.until("call", 2)
        assert house.count("bad_requests_total", reason="in_flight") == 0


@pytest.mark.parametrize("own_tokens", [True, False])
async def test_agents_are_told_apart_by_their_tokens_where_these_are_their_own(own_tokens: bool) -> None:
    board = Board()
    gate = Gate(board)
    options = {"token": None} if own_tokens else {}
    async with running(Listen(port=0, max_in_flight_per_session=1), board, **options) as house:
        first = await house.agent()
        await first.send(get("/api/v1/clusters/agent/c1/poll", "Authorization: Bearer one"))
        await board.until("call")
        second = await house.agent()
        await second.send(get("/api/v1/clusters/agent/c1/poll", "Authorization: Bearer two"))
        if own_tokens:
            await board.until("call", 2)
            gate.open.set()
        assert (await second.reply()).status == (200 if own_tokens else 429)


async def test_registers_count_by_the_name_in_their_body() -> None:
    board = Board()
    Gate(board)
    async with running(Listen(port=0, max_in_flight_per_session=1), board) as house:
        for number in (1, 2):
            agent = await house.agent()
            body = json.dumps({"name": "prod", "agent_id": f"pod-{number}"}).encode()
            await agent.send(post("/api/v1/clusters/agent/register", body))
            await board.until("call", number)
        reply = await house.ask(post("/api/v1/clusters/agent/register", b'{"name": "prod", "agent_id": "pod-1"}'))
        assert reply.status == 429


async def test_large_bodies_are_refused_while_others_fill_the_memory_for_them() -> None:
    async with running(Listen(port=0, max_body_bytes=1024, max_status_body_bytes=100_000)) as house:
        whole = post(STATUS, b'{"x":"' + b"y" * 99_990 + b'"}')
        agents = [await house.agent() for _ in range(2)]
        for number, agent in enumerate(agents):
            await agent.send(whole.replace(b"/a1/", f"/b{number}/".encode())[:-1000])
        async with asyncio.timeout(60):
            while house.frontend._server_context.budget.used_bytes < 190_000:
                await house.ask(get("/nope"))
        late = await house.agent()
        await late.send(whole[:20_000])
        reply = await late.reply()
        assert_error(reply, 503, "too many large bodies at a time")
        assert reply.headers["retry-after"] == "1"
        for agent in agents:
            await agent.send(whole[-1000:])
            assert (await agent.reply()).status == 200
        assert (await house.ask(whole)).status == 200
        assert house.frontend._server_context.budget.used_bytes == 0


class Owner:
    """Another replica that owns every agent, and reads the bodies that are passed on to it in pieces."""

    def elsewhere(self, token: str) -> bool:
        return True

    def forward_now(self, token: str, request: bytes, done: Callable[[bytes | None], None]) -> bool:
        return False

    async def forward(self, request: ProxyRequest, operation: str) -> ProxyResponse | None:
        assert not isinstance(request.body, bytes)
        size = sum([len(piece) async for piece in request.body])
        return ProxyResponse(200, (), str(size).encode())


async def test_a_large_body_for_another_replica_is_refused_while_others_fill_the_memory() -> None:
    """A body that is passed on in pieces meets the same bound as one that is read here."""
    listen = Listen(port=0, max_body_bytes=1024, max_status_body_bytes=200_000)
    async with running(listen, forwarder=Owner()) as house:
        whole = post(STATUS, b'{"x":"' + b"y" * 99_990 + b'"}')
        assert (await house.ask(whole)).body == b"99998"
        budget = house.frontend._server_context.budget
        assert budget.reserve(400_000)
        reply = await house.ask(whole)
        assert_error(reply, 503, "too many large bodies at a time")
        assert reply.headers["retry-after"] == "1"
        budget.release(400_000)
        assert (await house.ask(whole)).status == 200
        assert house.count("internal_errors_total", part="frontend") == 0


async def test_an_agent_that_reads_no_reply_is_dropped() -> None:
    board = Board()
    board.script = offering(3_000_000)
    async with running(Listen(port=0, body_timeout_s=0.2), board) as house:
        agent = await house.agent(receive_buffer_bytes=4096)
        await agent.send(POLL)
        await board.until("unwritten")
        assert house.count("replies_lost_total") == 1
