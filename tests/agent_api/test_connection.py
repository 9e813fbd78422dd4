"""What a peer can make the agents' port hold is bounded where it enters; small calls of others are served meanwhile."""

from __future__ import annotations

import asyncio
import gc
import gzip
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from shim.agent_api.connection import AgentConnection
from shim.config.settings import Listen, TlsFiles
from shim.core.agent_calls import AgentCall, PollCall
from shim.core.bounds import MAX_HEAD_BYTES, MAX_VALUES, MAX_WAITING_BYTES
from shim.ports import Caller, CallResult
from tests.support.frontend import (
    HEALTH,
    POLL,
    Agent,
    Board,
    HeldCalls,
    House,
    Reply,
    get,
    offering,
    plain_answer,
    post,
    running,
)

HEARTBEAT = "/api/v1/clusters/agent/c1/heartbeat"
BEAT = post(HEARTBEAT, b'{"status":"healthy"}', "Authorization: Bearer t")


# --- heads ---------------------------------------------------------------------------------------------------------


def big_head(size_bytes: int) -> bytes:
    """A whole request whose head has this size, in lines of 1,000 bytes."""
    lines, rest = divmod(size_bytes - len(HEALTH) - 10, 1000)
    head = HEALTH[:-2] + (b"X: " + b"x" * 995 + b"\r\n") * lines + b"Y: " + b"y" * rest
    head += b"y" * (size_bytes - len(head) - 4)
    return head + b"\r\n\r\n"


async def test_a_head_may_have_so_many_bytes_and_not_one_more() -> None:
    async with running() as house:
        assert (await house.ask(big_head(MAX_HEAD_BYTES))).status == 200
        reply = await house.ask(big_head(MAX_HEAD_BYTES + 1))
        assert (reply.status, reply.json["error"]) == (431, "the head of the request is too large")
        assert reply.headers["connection"] == "close"
        assert house.count("bad_requests_total", reason="head") == 1


async def test_a_head_too_large_is_refused_before_it_ends_and_its_sender_sees_why() -> None:
    async with running() as house:
        agent = await house.agent()
        line = b"X: " + b"x" * 995 + b"\r\n"
        await agent.send(HEALTH[:-2] + line * 120)
        await agent.send(line * 120)  # still writing when the answer comes
        assert (await agent.reply()).status == 431
        assert await agent.closed_by_peer() == b""


async def test_unfinished_heads_share_one_bound_and_small_calls_are_served_meanwhile() -> None:
    listen = Listen(port=0, max_body_bytes=32_768, max_status_body_bytes=32_768, header_timeout_s=60)
    async with running(listen) as house:
        hogs = [await house.agent() for _ in range(8)]
        for hog in hogs:
            await hog.send(big_head(24_000)[:-4])
        replies = [await hog.reply() for hog in hogs[2:]]  # two fit into twice the largest body
        assert [reply.status for reply in replies] == [503] * 6
        assert house.count("bad_requests_total", reason="memory") == 6
        assert (await house.ask(BEAT)).status == 200
        for hog in hogs[:2]:
            await hog.send(b"\r\n\r\n")
            assert (await hog.reply()).status == 200
        assert house.frontend._server_context.budget.used_bytes == 0


async def test_blank_lines_without_end_are_no_head() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(b"\r\n" * 100_000 + HEALTH)
        assert (await agent.reply()).status == 200


# --- what waits behind an unanswered request -----------------------------------------------------------------------


async def test_what_is_sent_behind_a_held_poll_stays_with_its_sender() -> None:
    board = Board()
    held = HeldCalls(board, PollCall)
    async with running(board=board) as house:
        hog = await house.agent()
        await hog.send(POLL)
        await board.until("call")
        flood = asyncio.ensure_future(hog.send(big_head(30_000) * 2000))
        await asyncio.sleep(0)
        for _ in range(50):
            assert (await house.ask(BEAT)).status == 200
        (connection,) = [each for each in house.frontend._web.connections if each._open]  # type: ignore[union-attr]
        assert MAX_WAITING_BYTES <= len(connection._backlog) <= MAX_WAITING_BYTES + 262_144
        assert not flood.done(), "60 MB are not taken"
        held.go.set()
        replies = [await hog.reply() for _ in range(2001)]
        await flood
        assert {reply.status for reply in replies} == {200}
        assert house.frontend._server_context.budget.used_bytes == 0


async def test_what_waits_behind_polls_shares_one_bound() -> None:
    board = Board()
    held = HeldCalls(board, PollCall)
    listen = Listen(port=0, max_body_bytes=20_000, max_status_body_bytes=20_000)
    async with running(listen, board) as house:
        hogs = [await house.agent() for _ in range(5)]
        for number, hog in enumerate(hogs):
            await hog.send(get(f"/api/v1/clusters/agent/c{number}/poll") + big_head(16_000))
        await board.until("call", 5)
        held.go.set()
        counts = [(await hog.closed_or(2)).count(b"HTTP/1.1 200") for hog in hogs]
        assert sorted(counts) == [1, 1, 1, 2, 2], "beyond the bound the poll is answered and the connection closed"
        assert house.count("bad_requests_total", reason="memory") == 3
        assert house.frontend._server_context.budget.used_bytes == 0


async def test_a_half_head_behind_a_held_poll_has_the_time_of_a_head() -> None:
    board = Board()
    held = HeldCalls(board, PollCall)
    async with running(Listen(port=0, header_timeout_s=0.2), board) as house:
        agent = await house.agent()
        await agent.send(POLL + HEALTH[:20])
        await board.until("call")
        async with asyncio.timeout(60):
            while not house.count("bad_requests_total", reason="head"):
                await house.ask(HEALTH)
        held.go.set()
        reply = await agent.reply()
        assert (reply.status, reply.json["commands"][0]["id"]) == (200, "cmd-1")
        assert await agent.closed_by_peer() == b""


async def test_a_half_head_that_came_with_an_answered_request_has_the_time_of_a_head() -> None:
    async with running(Listen(port=0, header_timeout_s=0.2)) as house:
        agent = await house.agent()
        await agent.send(HEALTH + HEALTH[:20])
        assert (await agent.reply()).status == 200
        assert (await agent.reply()).status == 408


# --- evidence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 20, len(BEAT) - 1])
async def test_half_a_request_in_one_segment_with_the_poll_is_no_evidence(cut: int) -> None:
    board = Board()
    board.script = offering()
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL + BEAT[:cut])
        await board.until("written")
        await agent.send(BEAT[cut:])
        await agent.reply()
        assert (await agent.reply()).status == 200
        assert board.steps == ["call", "written", "call"]


async def test_a_poll_that_began_before_the_reply_keeps_its_time_of_arrival() -> None:
    board = Board()
    held = HeldCalls(board, PollCall)
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("call")
        await agent.send(POLL[:30])
        await house.ask(HEALTH)
        before_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.01)  # the loop's time has steps of a millisecond
        held.go.set()
        await agent.reply()
        await agent.send(POLL[30:])
        await agent.reply()
        assert board.arrivals_s[-1] <= before_s


async def test_bytes_that_the_kernel_has_already_when_the_reply_is_written_are_no_evidence() -> None:
    board = Board()
    offer = offering()
    agents: list[Agent] = []

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        if isinstance(call, PollCall):
            agents[0].sock.send(BEAT)  # arrives between our last look at the socket and the reply
        return await offer(caller, call)

    board.script = script
    async with running(board=board) as house:
        agents.append(await house.agent())
        await agents[0].send(POLL)
        await agents[0].reply()
        assert (await agents[0].reply()).status == 200
        assert "next" not in board.steps


# --- chunked bodies ------------------------------------------------------------------------------------------------


def chunked(*chunks: bytes, trailers: bytes = b"", extension: bytes = b"", headers: bytes = b"") -> bytes:
    head = f"POST {HEARTBEAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer t\r\nTransfer-Encoding: chunked\r\n"
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return head.encode() + headers + b"\r\n" + body + b"0\r\n" + trailers + b"\r\n"


async def test_a_chunked_body_that_is_nothing_but_empty_lines_is_refused() -> None:
    async with running() as house:
        reply = await house.ask(chunked(b"\r\n\r\n" * 100_000))
        assert (reply.status, reply.json["error"]) == (400, "the body cannot be read")


@pytest.mark.parametrize("wrong", [b"zz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"-1\r\n", b"fffffffffffffffff\r\n"])
async def test_a_faulty_chunk_behind_an_answer_leaves_no_trace_in_the_log(
    wrong: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(Listen(port=0, auth="required")) as house:
        agent = await house.agent()
        head = chunked()[: -len(b"0\r\n\r\n")].replace(b"Bearer t", b"Bearer wrong")
        await agent.send(head + b"1\r\n{\r\n")
        assert (await agent.reply()).status == 401
        await agent.send(wrong)
        await agent.closed_by_peer()
        assert "Traceback" not in caplog.text


# --- connections ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path: Path) -> tuple[TlsFiles, ssl.SSLContext]:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "tls.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return TlsFiles(cert_file=str(tmp_path / "tls.pem")), context


async def test_connections_are_counted_before_their_handshake_and_have_its_time(
    tls: tuple[TlsFiles, ssl.SSLContext],
) -> None:
    files, context = tls
    async with running(Listen(port=0, tls=files, max_connections=5, header_timeout_s=60)) as house:
        for _ in range(5):
            await house.agent()
        async with asyncio.timeout(60):
            while house.count("connections") < 5:
                await house.loop_turn()
        late = await house.agent()
        assert await late.closed_by_peer() == b""
        assert house.count("bad_requests_total", reason="connections") == 1
    async with running(Listen(port=0, tls=files, max_connections=5, header_timeout_s=2)) as house:
        silent = await house.agent()
        await silent.closed_by_peer()
        async with asyncio.timeout(60):
            while house.count("connections"):
                await house.loop_turn()
        reader, writer = await asyncio.open_connection(house.host, house.port, ssl=context)
        writer.write(HEALTH)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"\0" * 100])
async def test_what_is_no_handshake_leaves_no_count(tls: tuple[TlsFiles, ssl.SSLContext], first: bytes) -> None:
    files, _ = tls
    async with running(Listen(port=0, tls=files, header_timeout_s=0.5)) as house:
        agent = await house.agent()
        await agent.send(first)
        agent.half_close()
        await agent.closed_by_peer()
        async with asyncio.timeout(60):
            while house.count("connections"):
                await house.loop_turn()
    assert house.board.calls == []


# --- one request, however it comes ---------------------------------------------------------------------------------

SPLITTABLE = {
    "heartbeat": BEAT,
    "poll": get("/api/v1/clusters/agent/c1/poll", "Authorization: Bearer t"),
    "health": get("/api/v1/health", "Authorization: Bearer t"),
    "HEAD": get("/api/v1/health", "Authorization: Bearer t", method="HEAD"),
    "no token": post(HEARTBEAT, b"{}"),
    "chunked": chunked(b'{"status":', b'"healthy"}'),
    "chunked, extension and trailer": chunked(b'{"status":"x"}', extension=b";a=b", trailers=b"X: y\r\n"),
    "chunked, empty lines": chunked(b'{\r\n\r\n"status":"x"\r\n\r\n}'),
    "a fault behind a chunk": chunked()[: -len(b"0\r\n\r\n")] + b"5\r\nab\r\n0\r\n\r\n",
    "gzip": post(
        HEARTBEAT, gzip.compress(b'{"status":"x"}', mtime=0), "Content-Encoding: gzip", "Authorization: Bearer t"
    ),
    "no gzip": post(HEARTBEAT, b'{"status":"x"}', "Content-Encoding: gzip", "Authorization: Bearer t"),
    "unmeetable": post(HEARTBEAT, b"{}", "Expect: tea", "Authorization: Bearer t"),
    "no JSON": post(HEARTBEAT, b"{", "Authorization: Bearer t"),
    "no route": post("/nope", b"{}", "Authorization: Bearer t"),
    "no method": post("/api/v1/health", b"{}", "Authorization: Bearer t"),
    "upgrade": get("/api/v1/health", "Connection: Upgrade", "Upgrade: websocket", "Authorization: Bearer t"),
    "absolute": get("http://localhost/api/v1/health", "Authorization: Bearer t"),
    "HTTP/1.0": get("/api/v1/health", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "last": post(HEARTBEAT, b"{}", "Connection: close", "Authorization: Bearer t"),
    "browser": post(HEARTBEAT, b"{}", "Origin: http://evil.example", "Authorization: Bearer t"),
    "too large": post(HEARTBEAT, b'{"x":"' + b"y" * 300 + b'"}', "Authorization: Bearer t"),
    "no HTTP": b"GET / HTTP/9.9\r\n\r\n",
    "two lengths": post(HEARTBEAT, b"{}", "Content-Length: 3"),
    "both lengths": post(HEARTBEAT, b"{}", "Transfer-Encoding: chunked"),
}
DIFFER = ("date", "x-request-id")


def essence(reply: Reply) -> tuple[int, bytes, dict[str, str]]:
    return reply.status, reply.body, {name: value for name, value in reply.headers.items() if name not in DIFFER}


async def answers(house: House, *ways: tuple[bytes, ...], warm: bool = True) -> list[tuple[int, bytes, dict[str, str]]]:
    """Return the answers to requests that come in pieces, each on a connection that has served one before."""
    agents = [await house.agent() for _ in ways]
    if warm:
        for agent in agents:
            await agent.send(BEAT)
            await agent.reply()
    for step in range(max(map(len, ways))):
        for agent, pieces in zip(agents, ways, strict=True):
            if step < len(pieces):
                await agent.send(pieces[step])
        await house.turn()
    head_only = ways[0][0].startswith(b"H")
    found = [essence(await agent.reply(head_only=head_only)) for agent in agents]
    for agent in agents:
        agent.close()
    return found


@pytest.mark.parametrize("name", SPLITTABLE)
async def test_a_request_gets_the_same_answer_whole_and_split_at_every_byte(name: str) -> None:
    request = SPLITTABLE[name]
    async with running(Listen(port=0, max_body_bytes=200, max_in_flight_per_session=1000)) as house:
        (whole,) = await answers(house, (request,))
        calls = len(house.board.calls) - 1
        assert await answers(house, (request,), warm=False) == [whole]
        cuts = range(1, len(request))
        before = len(house.board.calls)
        found = await answers(house, *((request[:cut], request[cut:]) for cut in cuts))
        assert [request[:cut] for cut, each in zip(cuts, found, strict=True) if each != whole] == []
        assert len(house.board.calls) - before == len(cuts) * (calls + 1)
        assert await answers(house, tuple(bytes([byte]) for byte in request)) == [whole]


@pytest.mark.parametrize("name", SPLITTABLE)
async def test_a_request_gets_the_same_answer_behind_others(name: str) -> None:
    request = SPLITTABLE[name]
    async with running(Listen(port=0, max_body_bytes=200, max_in_flight_per_session=1000)) as house:
        (expected,) = await answers(house, (request,))
        calls = len(house.board.calls) - 1
        before = len(house.board.calls)
        agent = await house.agent()
        await agent.send(BEAT + chunked(b"{}") + request)
        for _ in range(2):
            assert (await agent.reply()).status == 200
        assert essence(await agent.reply(head_only=request.startswith(b"HEAD"))) == expected
        assert len(house.board.calls) - before == calls + 2


def whole(request: bytes) -> tuple[bytes, ...]:
    return (request,)


def split(request: bytes) -> tuple[bytes, ...]:
    return request[:-1], request[-1:]


@pytest.mark.parametrize("pieces", [whole, split])
async def test_an_agent_with_enough_in_flight_is_refused_either_way(
    pieces: Callable[[bytes], tuple[bytes, ...]],
) -> None:
    board = Board()
    held = HeldCalls(board, PollCall)
    async with running(Listen(port=0, max_in_flight_per_session=2), board) as house:
        agent = await house.agent()
        await agent.send(BEAT)
        await agent.reply()
        polls = [await house.agent() for _ in range(2)]
        for poll in polls:
            await poll.send(POLL)
        await board.until("call", 3)
        board.script = plain_answer
        for piece in pieces(BEAT):
            await agent.send(piece)
            await house.turn()
        assert (await agent.reply()).status == 429
        held.go.set()


@pytest.mark.parametrize("values, status", [(MAX_VALUES + 2, 413), (1000, 200)])
async def test_a_body_may_have_so_many_values(values: int, status: int) -> None:
    async with running() as house:
        body = b'{"pods":[' + b"[]," * values + b"[]]}"
        reply = await house.ask(post("/api/v1/agents/a/status", body, "Authorization: Bearer t"))
        assert reply.status == status


async def test_commas_in_a_text_are_no_values() -> None:
    async with running() as house:
        body = b'{"success":true,"output":"' + b'a,[{:\\",' * 100_000 + b'"}'
        path = "/api/v1/clusters/agent/c1/commands/k/result"
        assert (await house.ask(post(path, body, "Authorization: Bearer t"))).status == 200


# --- found by tests/chaos/test_differential.py ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "last",
    [get("/api/v1/health", "Connection: close"), HEALTH.replace(b"HTTP/1.1", b"HTTP/1.0"), SPLITTABLE["last"]],
    ids=["close", "HTTP/1.0", "POST"],
)
async def test_bytes_behind_the_last_request_of_a_connection_are_ignored(last: bytes) -> None:
    """The parser rejects them, and an agent got a 400 behind its reply."""
    async with running() as house:
        for behind in (HEALTH, b"no request\r\n\r\n"):
            agent = await house.agent()
            await agent.send(last + behind)
            assert (await agent.reply()).status == 200
            assert await agent.closed_by_peer() == b""
        assert house.count("bad_requests_total", reason="http") == 0


@pytest.mark.parametrize("cut", [20, 100, MAX_HEAD_BYTES])
async def test_a_head_that_is_malformed_before_it_is_too_large_gets_the_same_answer_whole_and_split(cut: int) -> None:
    head = big_head(MAX_HEAD_BYTES + 100).replace(b"\r\n", b"\n", 1)
    async with running() as house:
        assert await answers(house, (head[:cut], head[cut:])) == await answers(house, (head,))
        assert (await house.ask(head)).status == 400


async def test_a_body_that_is_too_large_before_it_is_malformed_gets_the_same_answer_whole_and_split() -> None:
    body = chunked(b" " * 1500)
    async with running(Listen(port=0, max_body_bytes=1024)) as house:
        whole_body = await answers(house, (body[:-5] + b"zz\r\n\r\n",))
        assert await answers(house, (body[:-5], b"zz\r\n\r\n")) == whole_body
        assert whole_body[0][0] == 413


# --- garbage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        BEAT,
        3 * BEAT,
        POLL,
        b"POST /api/v1/clus",
        b"no HTTP at all\r\n\r\n",
        BEAT[:-3],
        BEAT.replace(b"/clusters/agent", b"/nowhere")[:-3],
    ],
    ids=[
        "nothing",
        "a heartbeat",
        "pipelined",
        "a poll",
        "half a head",
        "no HTTP",
        "half a body",
        "half a body for nobody",
    ],
)
async def test_a_lost_connection_is_freed_without_the_garbage_collector(sent: bytes) -> None:
    """Its search would keep the loop busy for most of a second with 10,000 sessions, so it is rare."""
    board = Board()
    HeldCalls(board, PollCall)
    gc.collect()
    before = sum(isinstance(each, AgentConnection) for each in gc.get_objects())
    gc.disable()
    try:
        async with running(board=board) as house, asyncio.timeout(60):
            for waits in (True, False):
                agent = await house.agent()
                await agent.send(sent)
                if waits:
                    await house.turn()
                agent.close()
            alive = 2  # the other one is that of `turn`
            while alive > 1:
                await house.turn()
                alive = sum(isinstance(each, AgentConnection) for each in gc.get_objects()) - before
    finally:
        gc.enable()
