"""The fence in front of a shard's upstream sockets: nothing is sent or dialled without a valid lease."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg")

from shim.cluster.shard import FencedUpstream
from shim.ports import DialFailure, DialRequest
from tests.support.replicas import ENDED, SHARDS, assert_no_double_owner, elsewhere, events, gateway

SPEC = DialRequest("wss://controller.example/ws", "t")


class Socket:
    def __init__(self) -> None:
        self.done: list[str] = []

    def send(self, message: Any) -> None:
        self.done.append(f"send {message}")

    def ping(self, payload: bytes) -> None:
        self.done.append("ping")

    def close(self, code: int) -> None:
        self.done.append(f"close {code}")

    def abort(self) -> None:
        self.done.append("abort")


class Upstream:
    """Dials are answered by the test."""

    def __init__(self) -> None:
        self.dialled: list[Any] = []

    def dial(self, spec: DialRequest, events: Any, done: Any) -> None:
        self.dialled.append(done)


class Fence:
    def __init__(self) -> None:
        self.valid = True
        self.upstream = Upstream()
        self.fenced = FencedUpstream(self.upstream, lambda: self.valid)

    def dial(self) -> tuple[Socket, list[Any]]:
        """Dial, and have the dial succeed; the inner socket, and what the dialling side got."""
        inner, got = Socket(), []
        events: Any = None
        self.fenced.dial(SPEC, events, got.append)
        self.upstream.dialled.pop()(inner)
        return inner, got


def test_everything_passes_while_the_lease_is_valid() -> None:
    inner, (socket,) = Fence().dial()
    socket.send("m")
    socket.ping(b"")
    socket.close(1000)
    assert inner.done == ["send m", "ping", "close 1000"]


@pytest.mark.parametrize("attempt", [lambda s: s.send("m"), lambda s: s.ping(b""), lambda s: s.close(1000)])
def test_without_the_lease_the_first_attempt_drops_all_sockets_and_sends_nothing(attempt: Any) -> None:
    fence = Fence()
    first, (socket,) = fence.dial()
    second, _ = fence.dial()
    fence.valid = False
    attempt(socket)
    assert set(first.done) == set(second.done) == {"abort"}


def test_a_socket_in_its_closing_handshake_is_dropped_with_the_others() -> None:
    fence = Fence()
    inner, (socket,) = fence.dial()
    socket.close(1000)
    fence.fenced.cut()
    assert inner.done == ["close 1000", "abort"]


def test_nothing_is_dialled_without_the_lease() -> None:
    fence = Fence()
    fence.valid = False
    events: Any = None
    fence.fenced.dial(SPEC, events, lambda _: pytest.fail("an answer"))
    assert fence.upstream.dialled == []


def test_a_dial_that_succeeds_after_the_loss_is_dropped_and_a_failure_is_passed_on() -> None:
    fence, got = Fence(), []
    events: Any = None
    for _ in range(2):
        fence.fenced.dial(SPEC, events, got.append)
    fence.valid = False
    late, failure = Socket(), DialFailure("tcp")
    fence.upstream.dialled[0](late)
    fence.upstream.dialled[1](failure)
    assert late.done == ["abort"]
    assert got == [failure]


# --- on real processes ----------------------------------------------------------------------------------------------


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(180)
async def test_a_paused_owner_sends_nothing_more(tmp_path: Path, pg_url: str) -> None:
    async with gateway(tmp_path, pg_url, lease_s=5) as gate:
        a, b = await gate.add("a", "b")
        await gate.settled(a, b)
        agents = [gate.agent(number) for number in range(6)]
        for agent in agents:
            await agent.register(a)
        agent = agents[0]
        owner, other = await elsewhere(gate, agent)
        await gate.push(agent, "c-1")
        await gate.until_state(other, "c-1", "queued")
        for _ in range(2):
            assert await agent.heartbeat(other) == 204
        owner.send(signal.SIGSTOP)
        assert await agent.heartbeat(other) == 204  # nobody answers, and agents need not wait
        assert await agent.poll_until(other, "c-1") == ["c-1"]
        await agent.result(other, "c-1")
        for each in agents:
            assert await each.heartbeat(other) == 204
        assert await gate.settled(other) == [SHARDS]
        found = await gate.until_state(other, "c-1", *ENDED)
        assert events(found).count("offered") == 1
        owner.send(signal.SIGCONT)
        await owner.event("lease_lost")
        assert await gate.settled(owner, other) == [SHARDS // 2, SHARDS // 2]
        for each in agents:
            assert await each.heartbeat(owner) == 204
            await gate.owner(each)
        assert assert_no_double_owner(tmp_path) >= 1
