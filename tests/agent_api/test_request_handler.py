"""What is answered at once is answered as on the long way; what is in any way different takes that."""

from __future__ import annotations

import asyncio

import pytest

from shim.core.agent_calls import Commands, Failed
from shim.ports import CallResult
from tests.support.frontend import POLL, Agent, Board, House, Reply, get, post, running

HEARTBEAT = "/api/v1/clusters/agent/c1/heartbeat"
BEAT = post(HEARTBEAT, b'{"status":"healthy"}', "Authorization: Bearer t")


class Watch(Board):
    """A board that tells which calls came by which way."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: list[str] = []

    def try_call_sync(self, *args: object) -> CallResult | None:
        answer = super().try_call_sync(*args)  # type: ignore[arg-type]
        self.ways.append("none" if answer is None else "express")
        return answer

    async def call(self, *args: object) -> CallResult:
        self.ways.append("long")
        return await super().call(*args)  # type: ignore[arg-type]


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
    board = Watch()
    async with running(board=board) as house:
        agent = await house.agent()
        first = await exchange(agent, request_bytes)
        second = await exchange(agent, request_bytes)
        assert board.ways == ["long", "express"]
        assert same(first, second)
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert house.count("connections") == 1


async def test_requests_on_the_fast_path_are_counted_like_others() -> None:
    board = Watch()
    async with running(board=board) as house:
        agent = await house.agent()
        for _ in range(5):
            await exchange(agent, BEAT)
        labels = {"dialect": "clusters_agent", "operation": "heartbeat"}
        assert board.ways.count("express") == 4
        assert house.count("requests_total", status="200", **labels) == 5
        assert house.count("request_duration_seconds_count", **labels) == 5


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
async def test_what_is_refused_takes_the_long_way(request_bytes: bytes, status: int) -> None:
    board = Watch()
    async with running(board=board) as house:
        agent = await warm(house)
        before = list(board.ways)
        assert (await exchange(agent, request_bytes)).status == status
        assert board.ways == before


async def test_another_token_on_the_same_connection_is_another_caller() -> None:
    board = Watch()
    async with running(board=board, token=None) as house:
        agent = await warm(house)
        await exchange(agent, BEAT.replace(b"Bearer t", b"Bearer other"))
        assert [client.token for client in board.clients][-1] == "other"
        assert (await exchange(agent, BEAT.replace(b"Authorization: Bearer t\r\n", b""))).status == 401


async def test_a_last_request_takes_the_long_way_and_closes() -> None:
    board = Watch()
    async with running(board=board) as house:
        agent = await warm(house)
        await agent.send(post(HEARTBEAT, b"{}", "Authorization: Bearer t", "Connection: close"))
        assert (await agent.reply()).headers["connection"] == "close"
        assert await agent.closed_by_peer() == b""
        assert board.ways[-1] == "long"


async def test_requests_in_pieces_and_in_a_row_are_answered_in_order() -> None:
    board = Watch()
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


async def test_a_call_that_must_wait_is_made_once_and_the_next_takes_the_fast_path_again() -> None:
    board = Watch()
    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def script(*_: object) -> CallResult:
        await waiting
        return CallResult(Commands((), 5))

    async with running(board=board) as house:
        agent = await warm(house)
        plain, board.script = board.script, script
        await agent.send(get("/api/v1/clusters/agent/c1/poll", "Authorization: Bearer t"))
        await board.until("call", 4)
        assert board.ways[-2:] == ["none", "long"]
        waiting.set_result(None)
        assert (await agent.reply()).status == 200
        board.script = plain
        await exchange(agent, BEAT)
        assert board.ways[-1] == "express"


async def test_a_refusal_of_the_agent_service_carries_its_retry_after() -> None:
    class Refusing(Watch):
        def try_call_sync(self, *args: object) -> CallResult | None:
            return CallResult(Failed(503, "later", 7))

    async with running(board=Refusing()) as house:
        agent = await house.agent()
        await exchange(agent, BEAT)
        reply = await exchange(agent, BEAT)
        assert (reply.status, reply.headers["retry-after"]) == (503, "7")
        assert reply.json == {"success": False, "error": "later"}


async def test_a_defect_is_an_internal_error_and_costs_one_reply(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Watch):
        broken = False

        def try_call_sync(self, *args: object) -> CallResult | None:
            if self.broken:
                raise RuntimeError("a defect")
            return super().try_call_sync(*args)

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
