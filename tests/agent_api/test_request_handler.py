"""A request that needs no waiting is answered without a handler task, and any other with the same reply by a task."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from shim.config.settings import Listen
from shim.core.agent_calls import Commands, Failed
from shim.ports import CallResult
from tests.support.frontend import POLL, Agent, Board, House, Reply, get, post, running

HEARTBEAT = "/api/v1/clusters/agent/c1/heartbeat"
LABELS = {"dialect": "clusters_agent", "operation": "heartbeat"}
BEAT = post(HEARTBEAT, b'{"status":"healthy"}', "Authorization: Bearer t")


async def exchange(agent: Agent, request: bytes) -> Reply:
    await agent.send(request)
    return await agent.reply()


async def warm(house: House) -> Agent:
    """A connection whose first request is over, as its caller is known from then on."""
    agent = await house.agent()
    assert (await exchange(agent, BEAT)).status == 200
    await exchange(agent, POLL)
    await exchange(agent, BEAT)
    return agent


def same(one: Reply, other: Reply) -> bool:
    """Equal but for what differs from request to request."""
    volatile = ("date", "x-request-id")

    def rest(reply: Reply) -> dict[str, str]:
        return {name: value for name, value in reply.headers.items() if name not in volatile}

    return (one.status, one.body, rest(one)) == (other.status, other.body, rest(other))


@pytest.mark.parametrize(
    "request_bytes",
    [
        BEAT,
        post(HEARTBEAT, b'{"status":"healthy"}', "Authorization: Bearer t", "User-Agent: Go-http-client/1.1"),
        get("/api/v1/clusters/agent/c1/poll", "Authorization: Bearer t"),
        get("/api/v1/health", "Authorization: Bearer t"),
    ],
)
async def test_both_ways_give_the_same_reply(request_bytes: bytes) -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await warm(house)
        calls, tasks = len(board.calls), house.handler_tasks
        first = await exchange(agent, request_bytes)
        assert house.handler_tasks == tasks
        assert house.count("connections") == 1
        # A last request is left to the handler task, because the connection has to be closed after it.
        second = await exchange(agent, request_bytes.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        assert house.handler_tasks == tasks + 1
        assert len(board.calls) == calls + 2
        assert second.headers.pop("connection") == "close"
        assert same(first, second)
        assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_requests_on_the_fast_path_are_counted_like_others() -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await warm(house)
        before, tasks = house.count("requests_total", status="200", **LABELS), house.handler_tasks
        for _ in range(5):
            await exchange(agent, BEAT)
        assert house.handler_tasks == tasks
        assert house.count("requests_total", status="200", **LABELS) == before + 5
        assert house.count("request_duration_seconds_count", **LABELS) == before + 5


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (post(HEARTBEAT, b"{}", "Authorization: Bearer t", "Origin: http://evil.example"), 403),
        (
            post(HEARTBEAT, b"{}", "Authorization: Bearer t", "Host: evil.example").replace(
                b"Host: localhost\r\n", b""
            ),
            403,
        ),
        (post(HEARTBEAT, b"{", "Authorization: Bearer t"), 400),
        (post(HEARTBEAT, b"[]", "Authorization: Bearer t"), 400),
        (post(HEARTBEAT, b"[" * 100 + b"]" * 100, "Authorization: Bearer t"), 400),
        (post(HEARTBEAT, b'{"a":' * 100 + b"1" + b"}" * 100, "Authorization: Bearer t"), 400),
        (post("/api/v1/clusters/agent/c1/nothing", b"{}", "Authorization: Bearer t"), 404),
        (get(HEARTBEAT, "Authorization: Bearer t"), 405),
        (post(HEARTBEAT, b'{"x":"' + b"y" * 2_000_000 + b'"}', "Authorization: Bearer t"), 413),
    ],
)
async def test_what_is_refused_does_not_reach_the_bridge(request_bytes: bytes, status: int) -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await warm(house)
        before = len(board.calls)
        assert (await exchange(agent, request_bytes)).status == status
        assert len(board.calls) == before
        agent.close()
        again = await warm(house)  # a connection whose first request was answered
        assert (await exchange(again, BEAT)).status == 200


async def test_another_token_on_the_same_connection_is_another_caller() -> None:
    board = Board()
    async with running(board=board, token=None) as house:
        agent = await warm(house)
        await exchange(agent, BEAT.replace(b"Bearer t", b"Bearer other"))
        assert [client.token for client in board.callers][-1] == "other"
        assert (await exchange(agent, BEAT.replace(b"Authorization: Bearer t\r\n", b""))).status == 401


async def test_a_last_request_needs_a_handler_task_and_closes() -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await warm(house)
        before = house.handler_tasks
        await agent.send(post(HEARTBEAT, b"{}", "Authorization: Bearer t", "Connection: close"))
        assert (await agent.reply()).headers["connection"] == "close"
        assert await agent.closed_by_peer() == b""
        assert house.handler_tasks == before + 1


async def test_requests_in_pieces_and_in_a_row_are_answered_in_order() -> None:
    board = Board()
    async with running(board=board) as house:
        agent = await warm(house)
        for cut in (1, 30, len(BEAT) - 5):
            await agent.send(BEAT[:cut])
            await asyncio.sleep(0)
            assert (await exchange(agent, BEAT[cut:])).status == 200
        await agent.send(BEAT + POLL + BEAT)
        bodies = [(await agent.reply()).body for _ in range(3)]
        assert bodies[0] == bodies[2]
        assert b"commands" in bodies[1]


async def test_a_call_that_must_wait_is_made_once_and_the_next_needs_no_handler_task_again() -> None:
    board = Board()
    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def script(*_: object) -> CallResult:
        await waiting
        return CallResult(Commands((), 5))

    async with running(board=board) as house:
        agent = await warm(house)
        plain, board.script = board.script, script
        await agent.send(get("/api/v1/clusters/agent/c1/poll", "Authorization: Bearer t"))
        await board.until("call", 4)
        waiting.set_result(None)
        assert (await agent.reply()).status == 200
        assert len(board.calls) == 4
        tasks = house.handler_tasks
        board.script = plain
        await exchange(agent, BEAT)
        assert house.handler_tasks == tasks


async def test_a_request_whose_agent_leaves_before_its_task_runs_is_dropped() -> None:
    """The rest of a request is a coroutine that has not started; it is closed, and the agent's count is released."""
    board = Board()

    async def script(*_: object) -> CallResult:
        raise AssertionError("the agent is gone")

    async with running(Listen(port=0, max_in_flight_per_session=1), board=board) as house:
        for _ in range(3):
            agent = await warm(house)
            plain, board.script = board.script, script
            calls = len(board.calls)
            await agent.send(POLL)
            agent.reset()
            await board.until("call", calls + 1)
            board.script = plain
        assert (await exchange(await house.agent(), POLL)).status == 200


async def test_a_refusal_of_the_agent_service_carries_its_retry_after() -> None:
    class Refusing(Board):
        def call(self, *_: object) -> CallResult:
            return CallResult(Failed(503, "later", 7))

    async with running(board=Refusing()) as house:
        agent = await house.agent()
        await exchange(agent, BEAT)
        reply = await exchange(agent, BEAT)
        assert (reply.status, reply.headers["retry-after"]) == (503, "7")
        assert reply.json == {"success": False, "error": "later"}


async def test_a_defect_is_an_internal_error_and_costs_one_reply(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Board):
        broken = False

        def call(self, *args: Any) -> CallResult | Coroutine[Any, Any, CallResult]:
            if self.broken:
                raise RuntimeError("a defect")
            return super().call(*args)

    board = Broken()
    async with running(board=board) as house:
        agent = await warm(house)
        board.broken = True
        reply = await exchange(agent, BEAT)
        assert (reply.status, reply.json) == (500, {"success": False, "error": "internal error"})
        assert house.count("internal_errors_total", part="frontend") == 1
        assert "a defect" in caplog.text
        board.broken = False
        assert (await exchange(agent, BEAT)).status == 200
