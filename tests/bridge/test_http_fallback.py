"""Mode `auto`: which calls go by HTTP, judged by the link that would carry them.

Rules: docs/reference/protocol.md#4-modes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from shim.core.agent_calls import Failed, PollCall, RegisterCall, Registered, ResultCall
from shim.core.link_state import LinkState
from shim.core.records import MarkCommands
from shim.fallback import FallbackPolicy
from shim.fallback.policy import PATIENCE_S
from shim.ports import Caller, ProxyRequest, ProxyResponse
from tests.bridge.conftest import MakeWorld, given, living
from tests.support.upstream import REFUSED
from tests.support.world import Agent, World

AUTO = {"mode": "auto", "fallback": {"url": "https://old.vendor.test", "after_s": 10, "hold_down_s": 60}}


def by_http(passthrough: FallbackPolicy, agent: Agent) -> bool:
    return passthrough.handles(Caller(agent.token, agent.connection), agent.heartbeat_call())


async def test_where_links_are_not_shared_each_agent_fails_over_for_itself(make_world: MakeWorld) -> None:
    world = await make_world(**AUTO, upstream={"share_link": False})
    passthrough = FallbackPolicy(world.bridge)
    cut, well = (world.agent(name=name, agent_id=f"pod-{name}") for name in ("cut", "well"))
    for agent in (cut, well):
        await agent.register()
        await agent.heartbeat()
    first, _ = world.controller.open_sockets()
    world.controller.manners.dial = REFUSED
    first.lose()
    for _ in range(12):
        ways = by_http(passthrough, cut), by_http(passthrough, well)
        await well.heartbeat()
        await world.pass_s(1)
    assert ways == (True, False)
    assert passthrough.active()


async def test_an_agent_that_is_gone_leaves_no_failover_behind(make_world: MakeWorld) -> None:
    world = await make_world(**AUTO, upstream={"token": ""})
    passthrough = FallbackPolicy(world.bridge)
    world.controller.manners.refuse = lambda spec: REFUSED if spec.token == "guessed" else None
    stranger = world.agent(token="guessed", cluster_id="c-1")
    by_http(passthrough, stranger)
    await world.pass_s(12)
    assert by_http(passthrough, stranger)
    assert passthrough.active()
    await world.pass_s(120)
    assert not list(world.bridge.links)
    assert not passthrough.active()


async def test_nothing_goes_by_http_while_no_agent_calls(make_world: MakeWorld) -> None:
    world = await make_world(**AUTO)
    passthrough = FallbackPolicy(world.bridge)
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    for _ in range(12):
        way = by_http(passthrough, agent)
        await world.pass_s(1)
    assert way
    assert passthrough.active()
    await world.pass_s(200)
    assert not passthrough.active()
    assert by_http(passthrough, agent), "it begins where it was"


async def test_commands_of_the_http_api_that_cannot_be_stored_are_not_reported_and_stay_in_its_reply(
    world: World,
) -> None:
    agent = await living(world)
    poll, caller = PollCall(agent.dialect, agent.target), Caller(agent.token, agent.connection)
    world.store.fail()
    assert await world.bridge.http_fallback.merge(caller, poll, [{"id": "k1"}], world.now) is None
    world.store.heal()
    await agent.live(40)
    assert world.metric("commands_total", event="rejected_store_unavailable") == 1
    assert not world.controller.got("command_result"), "the controller has not sent the command by the WebSocket"
    merged = await world.bridge.http_fallback.merge(caller, poll, [{"id": "k1"}], world.now)
    assert merged is not None
    assert [command.id for command in agent.take(merged)] == ["k1"]


async def test_what_ended_by_http_while_the_disk_was_full_does_not_come_again(world: World) -> None:
    agent = await given(world, "k1")
    world.store.fail()
    call = ResultCall(agent.dialect, agent.target, "k1", {"success": True})
    world.bridge.http_fallback.result_taken(Caller(agent.token, agent.connection), call)
    await world.settle()
    world.store.heal()
    await agent.live(10)
    assert await world.state("k1") == "closed"


async def test_results_of_commands_that_were_never_stored_do_not_pile_up_while_the_disk_is_full(world: World) -> None:
    agent = await living(world)
    world.store.fail()
    before = len(world.store.log)
    for number in range(100):
        call = ResultCall(agent.dialect, agent.target, f"k{number}", {"success": True})
        world.bridge.http_fallback.result_taken(Caller(agent.token, agent.connection), call)
    await world.settle()
    world.store.heal()
    await agent.live(20)
    steps = [each for each in world.store.log[before:] if isinstance(each, MarkCommands)]
    assert not steps, "they were not kept for a retry"


class AnsweredAtOnce(FallbackPolicy):
    """A policy whose API registers every agent."""

    async def _send(self, request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse(200, (), b'{"success": true, "cluster_id": "c-9"}')


class NeverAnswered(FallbackPolicy):
    """A policy whose API takes everything and answers nothing."""

    async def _send(self, request: ProxyRequest) -> ProxyResponse:
        if not isinstance(request.body, bytes):
            async for _ in request.body:
                pass
        await asyncio.Event().wait()
        raise AssertionError("nothing answers")


@pytest.mark.parametrize("complete", [True, False])
async def test_an_agent_that_hangs_up_was_not_served_only_if_the_api_had_its_whole_body(
    make_world: MakeWorld, complete: bool
) -> None:
    world = await make_world(mode="http", fallback={"url": "https://old.vendor.test"})
    passthrough = NeverAnswered(world.bridge)

    async def body() -> AsyncIterator[bytes]:
        yield b"half"
        if not complete:
            await asyncio.Event().wait()

    request = ProxyRequest("POST", "/upload", (), body(), Caller("tok", 1), None, world.now)
    serving = asyncio.ensure_future(passthrough.serve(request))
    await world.pass_s(PATIENCE_S + 1)
    serving.cancel()
    await world.settle()
    assert serving.cancelled()
    assert world.metric("fallback_calls_total", outcome="unreachable") == complete
    await passthrough.close()


async def test_a_registration_by_http_counts_although_its_agent_leaves_while_it_is_stored(
    make_world: MakeWorld,
) -> None:
    world = await make_world(mode="http", fallback={"url": "https://old.vendor.test"})
    passthrough, agent = AnsweredAtOnce(world.bridge), world.agent()
    call = RegisterCall(agent.dialect, agent.agent_id, agent.name, {"name": agent.name}, "", False)
    caller = Caller(agent.token, agent.connection)
    world.store.slow = True
    serving = asyncio.ensure_future(
        passthrough.serve(ProxyRequest("POST", "/register", (), b"{}", caller, call, world.now))
    )
    await world.until(lambda: bool(world.store.log))
    serving.cancel()
    await world.settle()
    assert serving.cancelled()
    assert world.metric("fallback_calls_total", outcome="2xx") == 1
    await passthrough.close()


async def test_the_first_call_after_a_long_outage_goes_by_http_and_after_a_long_return_by_the_websocket(
    make_world: MakeWorld,
) -> None:
    world = await make_world(**AUTO)
    passthrough = FallbackPolicy(world.bridge)
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    await world.pass_s(9.9)
    assert not by_http(passthrough, agent)
    world.controller.come_back()
    await world.pass_s(10)
    world.controller.go_away()
    await world.pass_s(9)
    assert not by_http(passthrough, agent), "a link that came back between two calls has not been down all the time"
    await world.pass_s(1)
    assert by_http(passthrough, agent)
    world.controller.come_back()
    await world.pass_s(70)
    assert not by_http(passthrough, agent)


async def test_an_agent_so_rare_that_its_link_is_given_up_between_its_calls_fails_over(make_world: MakeWorld) -> None:
    world = await make_world(**AUTO)
    passthrough = FallbackPolicy(world.bridge)
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    await world.pass_s(600)
    (link,) = world.bridge.links
    assert link.state is LinkState.IDLE
    assert by_http(passthrough, agent)
    world.controller.come_back()
    await world.pass_s(70)
    assert not by_http(passthrough, agent)
    await world.pass_s(600)
    assert link.state is LinkState.IDLE
    assert not by_http(passthrough, agent), "a link that was closed because nobody needed it was not down"


async def test_an_agent_that_was_never_registered_fails_over_although_it_exits_between_its_attempts(
    make_world: MakeWorld,
) -> None:
    """Agents of generation B4 and later do: the link of their token is removed before Kubernetes starts them again."""
    world = await make_world(**AUTO, upstream={"token": ""})
    passthrough = FallbackPolicy(world.bridge)
    world.controller.go_away()
    agent = world.agent(token="own")
    call = RegisterCall(agent.dialect, agent.agent_id, agent.name, {}, "", False)
    assert not passthrough.handles(Caller(agent.token, agent.connection), call)
    assert await agent.register() == Failed(503, "the controller cannot be reached", retry_after_s=5)
    await world.pass_s(40)
    assert not list(world.bridge.links)
    assert passthrough.handles(Caller(agent.token, agent.connection), call)
    world.controller.come_back()
    await world.pass_s(20)
    assert isinstance(await agent.register(), Registered)
    await agent.live(70)
    assert not by_http(passthrough, agent)
