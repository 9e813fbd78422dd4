"""What counts as delivered, shown on real sockets: every way in which an agent may leave.

Rules: docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import asyncio
import math
import select
import socket
from contextlib import suppress
from typing import Any

import pytest

from shim.agent_api import tcp_state
from shim.config.settings import Listen
from shim.core.agent_calls import AgentCall
from shim.core.command_queue import OpenUntil
from shim.ports import Caller, CallResult
from tests.support.frontend import HEALTH, POLL, Agent, Board, HeldCalls, get, offering, running

LARGE_BYTES = 12_000_000  # more than loopback sockets buffer
LAST_POLL = get("/api/v1/clusters/agent/c1/poll", "Connection: close")


def offering_board(size_bytes: int = 10) -> Board:
    board = Board()
    board.script = offering(size_bytes)
    return board


# --- the reply arrives --------------------------------------------------------------------------------------------


async def test_read_and_closed_in_order() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(POLL)
        assert [command["id"] for command in (await agent.reply()).json["commands"]] == ["cmd-1"]
        agent.close()
        await house.board.until("clean")
    assert house.board.steps == ["call", "written", "clean"]


async def test_the_next_request_on_the_connection_is_told_first() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.reply()
        await agent.send(HEALTH)
        await agent.reply()
        await agent.send(HEALTH)
        await agent.reply()
        assert house.board.steps == ["call", "written", "next", "call", "call"]


async def test_connections_have_numbers_of_their_own() -> None:
    async with running(board=offering_board()) as house:
        for _ in range(2):
            agent = await house.agent()
            await agent.send(POLL)
            await agent.reply()
            agent.close()
        await house.board.until("clean", 2)
    numbers = [client.connection for client in house.board.callers]
    assert len(set(numbers)) == 2
    assert sorted(entry[1] for entry in house.board.log if entry[0] == "closed") == sorted(numbers)


async def test_a_connection_without_commands_is_no_ones_business() -> None:
    async with running() as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.reply()
        await agent.send(POLL)
        await agent.reply()
        agent.close()
        await house.ask(HEALTH)
    assert house.board.steps == ["call"] * 3


async def test_a_large_reply_is_written_when_the_kernel_has_all_of_it() -> None:
    async with running(board=offering_board(LARGE_BYTES)) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await house.board.until("call")
        await agent.receive()
        assert "written" not in house.board.steps
        assert len(await _rest(agent)) > LARGE_BYTES - 65536
        await house.board.until("written")
        agent.close()
        await house.board.until("clean")


async def _rest(agent: Agent) -> bytes:
    """Bytes until the end of the JSON."""
    parts: list[bytes] = []
    while not (parts and parts[-1].endswith(b"}")):
        parts.append(await agent.receive())
    return b"".join(parts)


# --- the agent is gone before the reply ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
async def test_hanging_up_cancels_a_held_call(how: str) -> None:
    board = Board()
    HeldCalls(board)
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("call")
        getattr(agent, how)()
        await board.until("cancelled")
        assert board.steps == ["call", "cancelled"]
        assert (await house.ask(get("/nope"))).status == 404  # others are served


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
async def test_hanging_up_unnoticed_leaves_the_reply_unwritten(how: str) -> None:
    """FIN or RST is in the kernel, the event loop has not seen it when the answer is ready."""
    board = Board()
    inner = offering()

    async def script(caller: Caller, call: AgentCall) -> CallResult:
        getattr(agent, how)()
        return await inner(caller, call)

    board.script = script
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("unwritten")
        assert board.steps == ["call", "unwritten"]
        assert house.count("replies_lost_total") == 1


async def test_a_cancellation_that_meets_the_answer_is_no_delivery() -> None:
    board = Board()
    held = HeldCalls(board)
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("call")
        agent.reset()
        held.go.set()
        await board.until("unwritten" if "cancelled" not in board.steps else "cancelled")
    assert "written" not in board.steps


async def test_half_a_body_is_no_call() -> None:
    async with running() as house:
        agent = await house.agent()
        path = "/api/v1/clusters/agent/c1/heartbeat"
        await agent.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        agent.close()
        await house.ask(HEALTH)
    assert len(house.board.calls) == 1


# --- the reply is written, the agent never reads it ---------------------------------------------------------------


async def test_closing_without_reading_is_a_reset() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await house.board.until("written")
        await _readable(agent)
        agent.close()
        await house.board.until("reset")
    assert house.board.steps == ["call", "written", "reset"]


async def test_a_reset_after_reading_is_no_evidence() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.reply()
        agent.reset()
        await house.board.until("reset")
    assert house.board.steps == ["call", "written", "reset"]


async def test_an_agent_that_stops_reading_is_dropped() -> None:
    async with running(Listen(port=0, body_timeout_s=0.2), offering_board(LARGE_BYTES)) as house:
        agent = await house.agent(receive_buffer_bytes=4096)
        await agent.send(POLL)
        await house.board.until("unwritten")
        assert house.board.steps == ["call", "unwritten"]
        await agent.closed_by_peer()


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
async def test_half_a_reply_is_none(how: str) -> None:
    async with running(Listen(port=0, body_timeout_s=1), offering_board(LARGE_BYTES)) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.receive()
        getattr(agent, how)()
        await house.board.until("unwritten")
        assert house.board.steps == ["call", "unwritten"]


async def _readable(agent: Agent) -> None:
    """Until something is in the agent's receive buffer."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(agent.sock, ready.set)
    await ready.wait()
    loop.remove_reader(agent.sock)


# --- pipelining ---------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order_and_prove_nothing() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(POLL + POLL)
        ids = [(await agent.reply()).json["commands"][0]["id"] for _ in range(2)]
        assert ids == ["cmd-1", "cmd-2"]
        await agent.send(HEALTH)
        await agent.reply()
        agent.close()
        await house.board.until("clean")
    assert house.board.steps == ["call", "written", "call", "written", "call", "clean"]


@pytest.mark.parametrize("early", [POLL, POLL[:10]])
async def test_a_request_sent_before_the_reply_proves_nothing(early: bytes) -> None:
    board = Board()
    held = HeldCalls(board)
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await board.until("call")
        await agent.send(early)
        await house.ask(get("/nope"))  # by then the early bytes have been seen, too
        held.go.set()
        await agent.reply()
        await agent.send(POLL[len(early) :])
        await agent.reply()
        assert board.steps == ["call", "written", "call", "written"]


# --- the last reply of a connection -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
async def test_a_last_reply_waits_for_the_agents_own_close(version: str) -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(LAST_POLL.replace(b"HTTP/1.1", version.encode()))
        assert b"cmd-1" in await agent.closed_by_peer()  # the server closes its side first: a reader until the end ends
        agent.close()
        await house.board.until("clean")
    assert house.board.steps == ["call", "written", "clean"]


async def test_a_last_reply_that_was_never_read() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(LAST_POLL)
        await house.board.until("written")
        await _readable(agent)
        agent.close()
        await house.board.until("reset")
    assert house.board.steps == ["call", "written", "reset"]


async def test_an_agent_that_never_closes_does_not_hold_the_connection() -> None:
    async with running(board=offering_board()) as house:
        agent = await house.agent()
        await agent.send(LAST_POLL)
        await house.board.until("clean")
        assert b"cmd-1" in await agent.closed_by_peer()


async def test_an_idle_connection_that_we_close_was_acknowledged() -> None:
    async with running(Listen(port=0, keepalive_s=0.1), offering_board()) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.reply()
        await house.board.until("clean")
        assert await agent.closed_by_peer() == b""


# --- the kernel ---------------------------------------------------------------------------------------------------


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return server.accept()[0], client


def test_a_fin_that_hides_a_reset_is_found_out() -> None:
    """The agent closed before our bytes came: it answers them with a reset, yet we read an orderly end."""
    ours, theirs = _pair()
    theirs.close()
    ours.send(b"a reply")
    with ours:
        assert ours.recv(1) == b"", "this is all that asyncio would tell"
        assert not tcp_state.acknowledged(ours)


def test_a_reset_after_a_half_close_is_found_out() -> None:
    """All is acknowledged, and end of file is all that reading tells, but the agent left without having read."""
    ours, theirs = _pair()
    theirs.shutdown(socket.SHUT_WR)
    ours.send(b"a reply")
    theirs.close()
    with ours:
        assert ours.recv(1) == b""
        assert not tcp_state.acknowledged(ours)


def test_a_peer_on_this_machine_has_the_connection_open_now_or_not_at_all() -> None:
    ours, theirs = _pair()
    with ours, theirs:
        ours.setblocking(False)
        ours.send(b"a reply")
        assert tcp_state.open_until(ours, 7.0) == 7.0
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(65_536))
        assert tcp_state.open_until(ours, 7.0) == -math.inf  # not all of it has arrived
        theirs.settimeout(30)
        while tcp_state.open_until(ours, 7.0) < 7.0:
            theirs.recv(1_048_576)
        theirs.close()
        assert tcp_state.open_until(ours, 7.0) == -math.inf
    assert tcp_state.open_until(ours, 7.0) == -math.inf


def test_what_the_kernel_tells() -> None:
    ours, theirs = _pair()
    with ours, theirs:
        assert tcp_state.acknowledged(ours)
        assert not tcp_state.hung_up(ours)
        assert not tcp_state.unread(ours)
        theirs.send(b"ab")
        select.select([ours], [], [], 30)
        assert tcp_state.unread(ours)
        ours.recv(1)
        assert tcp_state.unread(ours)
        ours.recv(1)
        assert not tcp_state.unread(ours)
        theirs.shutdown(socket.SHUT_WR)
        assert tcp_state.hung_up(ours)
        assert tcp_state.acknowledged(ours)
    assert tcp_state.hung_up(ours)
    assert not tcp_state.acknowledged(ours)
    assert not tcp_state.unread(ours)


class FaultyEvidence(Board):
    """Raises at the first report, and ends the watch at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.reports = 0
        self.reported = asyncio.Event()

    def connection_open(self, connection: int, until_s: float) -> bool:
        self.reports += 1
        self.reported.set()
        if self.reports == 1:
            raise RuntimeError("a defect")
        return False


async def test_a_watch_that_a_report_ended_begins_again_with_the_next_reply() -> None:
    loop, faults = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: faults.append(context))
    evidence, (ours, theirs) = FaultyEvidence(), _pair()
    watch = tcp_state.PeerWatch(evidence, 1)
    with ours, theirs:
        for _ in range(3):
            evidence.reported.clear()
            watch.begin(ours)
            async with asyncio.timeout(60):
                await evidence.reported.wait()
            assert watch.open_until() == -math.inf, "the watch has ended"
    assert len(faults) == 1


async def test_a_failing_agent_service_does_not_break_the_connection() -> None:
    class Broken(Board):
        def written(self, receipt: object, open_until: OpenUntil) -> None:
            super().written(receipt, open_until)
            raise RuntimeError("a defect")

    board = Broken()
    board.script = offering()
    async with running(board=board) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.reply()
        assert await agent.closed_by_peer() == b"", "no second response follows the first"
        assert house.count("internal_errors_total", part="frontend") == 1
