"""Every refused call is counted with its route and reason, whichever part of the server refuses it."""

from __future__ import annotations

import pytest

from shim.config.settings import Listen
from shim.core.agent_calls import Failed
from shim.core.call_records import RecentCalls
from shim.ports import CallResult
from tests.support.frontend import POLL, Board, get, post, running

REGISTER = "/api/v1/clusters/agent/register"
BEAT = "/api/v1/clusters/agent/c1/heartbeat"
BEAT_ROUTE = "POST /api/v1/clusters/agent/{cluster_id}/heartbeat"


@pytest.mark.parametrize(
    "request_bytes, status, route, reason",
    [
        (post("/api/v1" + REGISTER + "?token=secret"), 404, "POST /api/v1" + REGISTER, "no such endpoint"),
        (get(BEAT), 405, f"GET {BEAT}", ""),
        (post(REGISTER, b"{}"), 400, f"POST {REGISTER}", "agent_id is required"),
        (post(BEAT, b"{"), 400, BEAT_ROUTE, ""),
        (post(BEAT, b"{}", "Origin: http://page"), 403, f"POST {BEAT}", "requests of browsers are refused"),
        (post(BEAT, b"x" * 2000), 413, BEAT_ROUTE, ""),
        (b"\x16\x03\x01 nonsense\r\n\r\n", 400, "a request without a route", "malformed request"),
    ],
)
async def test_every_refused_call_is_counted_with_its_route(
    request_bytes: bytes, status: int, route: str, reason: str
) -> None:
    recent = RecentCalls()
    async with running(Listen(port=0, max_body_bytes=1000), refused_calls=recent) as house:
        assert (await house.ask(request_bytes)).status == status
        ((kind, calls),) = recent.last_minute(0.0)
        assert (kind.status, kind.route, calls) == (status, route, 1)
        assert reason in kind.reason
        assert "secret" not in str(kind)


class Refusing(Board):
    """A bridge that refuses every call at once."""

    def call(self, *_: object) -> CallResult:
        return CallResult(Failed(401, "the controller refuses the token"))


async def test_what_the_bridge_refuses_is_counted_on_both_paths() -> None:
    recent = RecentCalls()
    async with running(board=Refusing(), refused_calls=recent) as house:
        agent = await house.agent()
        for _ in range(3):  # the first one takes the long way, the others are answered at once where that can be
            await agent.send(POLL)
            assert (await agent.reply()).status == 401
    ((kind, calls),) = recent.last_minute(0.0)
    assert (kind.status, kind.reason, calls) == (401, "the controller refuses the token", 3)


async def test_a_served_call_is_not_counted() -> None:
    recent = RecentCalls()
    async with running(refused_calls=recent) as house:
        assert (await house.ask(POLL)).status == 200
    assert recent.last_minute(0.0) == []
