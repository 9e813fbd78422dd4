"""The end of heads and bodies that arrive in pieces, and heads that need not be parsed again."""

from __future__ import annotations

import gzip
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.agent_api.connection import AgentConnection
from shim.config.settings import Listen
from shim.core.agent_calls import (
    AgentCall,
    Commands,
    HeartbeatCall,
    OfferedCommand,
    PollCall,
    SessionTarget,
    TargetKind,
)
from shim.core.bounds import FREE_BYTES
from shim.http_heads import MAX_KNOWN_HEADERS, MAX_KNOWN_HEADS, EmptyLine, KnownHeads
from shim.ports import Caller, CallResult
from tests.support.frontend import POLL, Agent, Board, HeldCalls, House, Reply, get, offering, post, running

END = b"\r\n\r\n"
HEARTBEAT = "/api/v1/clusters/agent/c1/heartbeat"
TOKEN = "Authorization: Bearer t"
POLL_T = get("/api/v1/clusters/agent/c1/poll", TOKEN)


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", END]), max_size=12).map(b"".join), st.data())
def test_an_empty_line_is_found_wherever_it_is_cut(text: bytes, data: st.DataObject) -> None:
    search, seen, found = EmptyLine(), 0, 0
    rest = text
    while rest:
        piece = rest[: data.draw(st.integers(1, len(rest)))]
        end = search.find(piece)
        if end:
            found = seen + end
            break
        seen += len(piece)
        rest = rest[len(piece) :]
    at = text.find(END)
    assert found == (0 if at < 0 else at + len(END))


def test_a_search_begins_anew_behind_each_empty_line() -> None:
    search = EmptyLine()
    assert search.find(b"a\r\n\r\nb") == 5
    assert search.find(b"\n\r\n") == 0  # the line end before it belonged to the empty line that was found
    assert search.find(b"\r\n") == 2


# --- known heads ------------------------------------------------------------------------------------------------------


async def known_after(requests: list[bytes]) -> KnownHeads:
    """The heads that a connection knows after these requests were answered."""
    async with running() as house:
        agent = await house.agent()
        for request in requests:
            await agent.send(request)
            await agent.reply()
        assert house.frontend._web is not None
        (connection,) = house.frontend._web.connections
        assert isinstance(connection, AgentConnection)
        return connection._known_heads


async def test_a_head_is_known_once_however_often_it_comes() -> None:
    beats = [post(HEARTBEAT, body, TOKEN) for body in (b'{"status":"a"}', b'{"status":"b"}', b'{"status":"a"}')]
    known = await known_after([*beats, POLL, POLL])
    assert [each.size_bytes for each in known] == [len(beats[0]), len(POLL)]
    assert all(each.head.endswith(END) and each.head.count(END) == 1 for each in known)


async def test_a_known_head_has_each_requests_own_body() -> None:
    async with running() as house:
        agent = await house.agent()
        for status in ("up", "ab", "cd"):
            await agent.send(post(HEARTBEAT, b'{"status":"%s"}' % status.encode(), TOKEN))
            assert (await agent.reply()).status == 200
        assert statuses(house) == ["up", "ab", "cd"]


def many_lines(number: int) -> list[str]:
    return [f"X-{each}: y" for each in range(number)]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(post(HEARTBEAT, b"{}", TOKEN, "Expect: 100-continue"), id="an interim response"),
        pytest.param(post(HEARTBEAT, b" " * FREE_BYTES, TOKEN), id="large"),
        pytest.param(post(HEARTBEAT, b"{}", TOKEN, *many_lines(MAX_KNOWN_HEADERS)), id="many lines"),
        pytest.param(get("/ws", TOKEN, "Connection: Upgrade", "Upgrade: websocket"), id="an upgrade"),
        pytest.param(
            post(HEARTBEAT, b"{}", TOKEN, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"
        ),
    ],
)
async def test_a_head_that_is_large_or_asks_for_more_than_a_reply_is_always_parsed(request_: bytes) -> None:
    assert await known_after([request_]) == ()


async def test_a_head_is_parsed_again_where_its_request_came_in_pieces_or_with_others() -> None:
    async with running() as house:
        agent = await house.agent()
        beat = post(HEARTBEAT, b'{"status":"up"}', TOKEN)
        for pieces in ([beat], [beat[:-5], beat[-5:]], [beat + beat], [b"\r\n" + beat], [beat]):
            await _exchange(agent, pieces, replies=2 if pieces == [beat + beat] else 1)
        assert statuses(house) == ["up"] * 6


async def _ask(agent: Agent, request: bytes) -> Reply:
    await agent.send(request)
    return await agent.reply()


async def _exchange(agent: Agent, pieces: list[bytes], replies: int) -> None:
    for piece in pieces:
        await agent.send(piece)
    for _ in range(replies):
        assert (await agent.reply()).status == 200


def statuses(house: House) -> list[str]:
    """The states in the heartbeats that arrived."""
    return [call.status for call in house.board.calls if isinstance(call, HeartbeatCall)]


async def test_a_connection_knows_its_newest_heads() -> None:
    polls = [get(f"/api/v1/clusters/agent/c{number}/poll", TOKEN) for number in range(MAX_KNOWN_HEADS + 2)]
    assert [each.head for each in await known_after(polls)] == polls[2:]


async def test_the_token_of_a_known_head_is_compared_each_time() -> None:
    accepted = "t"
    async with running(Listen(auth="required"), token=lambda: accepted) as house:
        agent = await house.agent()
        seen = []
        for accepted in ("t", "t", "t", "other", "t"):  # noqa: B007 - the server reads it
            await agent.send(POLL_T)
            seen.append((await agent.reply()).status)
    assert seen == [200, 200, 200, 401, 200]


@pytest.mark.parametrize(
    "request_, status",
    [
        (get("/api/v1/unknown", TOKEN), 404),
        (get(HEARTBEAT, TOKEN), 405),
        (get("/api/v1/clusters/agent/c1/poll", TOKEN, "Origin: http://a.example"), 403),
    ],
)
async def test_a_known_head_that_is_not_accepted_is_refused_each_time(request_: bytes, status: int) -> None:
    async with running() as house:
        agent = await house.agent()
        replies = [await _ask(agent, request_) for _ in range(4)]
    assert [reply.status for reply in replies] == [status] * 4
    assert len({reply.body for reply in replies}) == 1


async def test_each_of_two_known_heads_keeps_its_own_headers() -> None:
    """A Go agent gets no body for a heartbeat, any other gets one; each gets its own request id back."""
    async with running() as house:
        agent = await house.agent()
        of_go = post(HEARTBEAT, b"{}", TOKEN, "User-Agent: Go-http-client/1.1", "X-Request-Id: go")
        of_other = post(HEARTBEAT, b"{}", TOKEN, "User-Agent: curl/8", "X-Request-Id: other")
        seen = [await _ask(agent, request) for request in [of_go, of_other] * 3]
    assert [(reply.status, reply.headers["x-request-id"]) for reply in seen] == [(204, "go"), (200, "other")] * 3


async def test_each_poll_with_a_known_head_is_answered_by_its_own_outcome() -> None:
    """The reply to a poll without commands is kept, and used only for that very outcome."""
    board = Board()
    empty, command = Commands((), 5), OfferedCommand("cmd-1", "deploy", {}, "2026-01-01T00:00:00Z")
    outcomes = [empty, empty, Commands((command,), 5), empty, Commands((), 9), Commands((), 5)]

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        outcome = outcomes[len(board.calls) - 1]
        return CallResult(outcome, receipt=1 if outcome.commands else None)

    board.script = script
    async with running(board=board) as house:
        agent = await house.agent()
        replies = [(await _ask(agent, POLL)).json for _ in outcomes]
    seen = [([each["id"] for each in reply["commands"]], reply["poll_frequency"]) for reply in replies]
    assert seen == [([], 5), ([], 5), (["cmd-1"], 5), ([], 5), ([], 9), ([], 5)]
    assert board.calls == [PollCall("clusters_agent", SessionTarget(TargetKind.CLUSTER, "c1"))] * 6


async def test_a_request_with_a_known_head_is_evidence_for_the_reply_before_it() -> None:
    board = Board()
    board.script = offering()
    async with running(board=board) as house:
        agent = await house.agent()
        for number in range(1, 4):
            [command] = (await _ask(agent, POLL)).json["commands"]
            assert command["id"] == f"cmd-{number}"
            await board.until("written", number)
        assert board.steps == ["call", "written", *["next", "call", "written"] * 2]


async def test_a_known_head_whose_answer_takes_time_has_its_body_and_keeps_what_follows() -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await house.agent()
        agent.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the third waits for the reply
        await _ask(agent, beat("first"))
        held = HeldCalls(board, HeartbeatCall)
        await agent.send(beat("other"))
        await board.until("call", 2)
        await agent.send(beat("third"))
        await house.turn()
        assert statuses(house) == ["first", "other"], "one request at a time"
        held.go.set()
        assert [(await agent.reply()).status for _ in range(2)] == [200, 200]
        assert statuses(house) == ["first", "other", "third"]
        assert (await _ask(agent, beat("again"))).status == 200


@pytest.mark.parametrize("early", [POLL, POLL[:10]])
async def test_what_is_sent_behind_a_held_poll_with_a_known_head_is_no_evidence(early: bytes) -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await house.agent()
        agent.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the early bytes wait for the reply
        await _ask(agent, POLL)
        held = HeldCalls(board)
        await agent.send(POLL)
        await board.until("call", 2)
        await agent.send(early)
        await house.ask(get("/nope"))  # by then the early bytes have been seen, too
        held.go.set()
        await agent.reply()
        await agent.send(POLL[len(early) :])
        await agent.reply()
        assert board.steps == ["call", "call", "written", "call", "written"]


async def test_a_body_with_an_empty_line_is_no_part_of_its_head() -> None:
    async with running() as house:
        agent = await house.agent()
        for status in ("first", "other", "other"):
            request = post(HEARTBEAT, b'{"status":"%s",\r\n\r\n"x":1}' % status.encode(), TOKEN)
            assert (await _ask(agent, request)).status == 200
        assert statuses(house) == ["first", "other", "other"]


async def test_a_compressed_body_behind_a_known_head_is_decompressed() -> None:
    async with running() as house:
        agent = await house.agent()
        request = post(HEARTBEAT, gzip.compress(b'{"status":"up"}'), TOKEN, "Content-Encoding: gzip")
        assert [(await _ask(agent, request)).status for _ in range(3)] == [200] * 3
        assert statuses(house) == ["up"] * 3


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(b"GET /nope HTTP/1.1\r\nX-A: ", id="in a head"),
        pytest.param(post("/nope", b" " * len(POLL_T))[: -len(POLL_T)], id="in a body"),
    ],
)
async def test_bytes_inside_another_request_are_no_request_although_they_are_one_that_is_known(before: bytes) -> None:
    async with running() as house:
        agent = await house.agent()
        agent.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert (await _ask(agent, POLL_T)).status == 200
        await agent.send(before)
        await house.turn()
        await agent.send(POLL_T)
        await house.turn()
        assert (await agent.reply()).status == 404
        assert len(house.board.calls) == 1


async def test_an_agent_that_hangs_up_on_a_held_poll_with_a_known_head_is_noticed() -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await house.agent()
        await _ask(agent, POLL)
        HeldCalls(board)
        await agent.send(POLL)
        await board.until("call", 2)
        agent.close()
        await board.until("cancelled")


def beat(status: str) -> bytes:
    """A heartbeat; those with a state of five letters have the same head."""
    return post(HEARTBEAT, b'{"status":"%s"}' % status.encode(), TOKEN)
