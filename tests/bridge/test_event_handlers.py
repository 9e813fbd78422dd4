"""What follows from an event of a link, and in which order (docs/reference/protocol.md#21-link-life)."""

from __future__ import annotations

import pytest

from shim.bridge import gateway_redirect as gateways
from shim.bridge import link_pool, links, registration, upstream_connection, upstream_messages
from shim.bridge.event_handlers import ResultsSent
from shim.core.records import SaveSession
from tests.bridge.conftest import MakeWorld
from tests.bridge.test_links import living
from tests.bridge.test_session_registry import OWN, beat
from tests.support.upstream import REFUSED
from tests.support.world import World

EVENTS = {
    *(links.LinkOpened, links.LinkOnline, links.LinkLost, links.RetryDue, links.TokenRefused, links.TokenAccepted),
    *(registration.ReplayFinished, registration.SessionAnnounced, link_pool.LinkRemoved, ResultsSent),
    *(upstream_connection.ResultsConfirmed, upstream_messages.SessionUnknown, upstream_messages.GatewayNamed),
    *(gateways.GatewayOpened, gateways.GatewayClosed, gateways.GatewayLost),
}


async def test_every_event_has_one_handler(world: World) -> None:
    assert set(world.bridge.ctx.events.handlers) == EVENTS


async def test_a_link_that_comes_online_carries_registrations_then_results_then_heartbeats(world: World) -> None:
    agent = await living(world)
    world.controller.push("k1")
    await world.settle()
    await agent.poll()
    world.controller.go_away()
    await world.settle()
    await agent.result("k1")
    world.controller.come_back()
    await world.pass_s(10)
    carried = [sent.message.type for sent in world.controller.log if sent.socket is world.controller.socket]
    assert carried == ["register", "command_result", "heartbeat"]


@pytest.mark.parametrize(
    "dialect, expected",
    [
        ("agents", ["register", "command_result", "heartbeat"]),
        ("clusters_agent", ["command_result", "heartbeat"]),  # its heartbeats carry the cluster id that it has already
    ],
)
async def test_an_agent_that_never_registered_is_replayed_if_its_id_is_no_cluster_id(
    make_world: MakeWorld, dialect: str, expected: list[str]
) -> None:
    world = await make_world(identity={"name": "prod"})
    world.controller.go_away()
    await world.settle()
    agent = world.agent(dialect=dialect, agent_id="a-1", cluster_id="c-9")
    await agent.heartbeat()
    await agent.result("k1")
    world.controller.come_back()
    await agent.live(10)
    carried = [sent.message.type for sent in world.controller.log if sent.socket is world.controller.socket]
    assert carried == expected


async def test_a_result_that_is_confirmed_in_the_moment_of_a_stop_is_closed(world: World) -> None:
    agent = await living(world)
    world.controller.push("k1")
    await world.settle()
    await agent.poll()
    world.controller.manners.acks = world.controller.manners.pongs = False
    await agent.result("k1")
    await world.settle()
    assert await world.state("k1") == "answered"
    world.bridge.ctx.events.put(upstream_connection.ResultsConfirmed(tuple(world.bridge.outbox._entries)))
    world.bridge.stop()
    await world.settle()
    assert await world.state("k1") == "closed"


async def test_a_heartbeat_that_meets_the_link_coming_online_is_sent_once(world: World) -> None:
    agent = await living(world)
    world.store.slow = True  # the results are being read while the agent calls
    world.controller.socket.lose()
    await world.pass_s(3)
    await agent.heartbeat(status="degraded")
    world.store.catch_up()
    await world.settle()
    carried = [sent.message.type for sent in world.controller.log if sent.socket is world.controller.socket]
    assert carried == ["register", "heartbeat"]


async def test_a_link_that_is_lost_before_it_is_online_replays_again(world: World) -> None:
    await living(world)
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.pass_s(3)
    assert not any(link.online for link in world.bridge.links)
    world.controller.manners.registers = True
    world.controller.socket.lose()
    await world.pass_s(3)
    assert all(link.online for link in world.bridge.links)
    carried = [sent.message.type for sent in world.controller.log if sent.socket is world.controller.socket]
    assert carried == ["register", "heartbeat"]


async def test_sessions_of_an_own_token_are_stored_once_it_is_accepted(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    world.controller.manners.acks = False
    agent = world.agent(cluster_id="c-1", token="good")
    assert await beat(agent) == 200
    await world.settle()
    assert not [each for each in world.store.log if isinstance(each, SaveSession)], "an open socket is no acceptance"
    world.controller.manners.acks = True
    await agent.live(60)
    assert {each.record.key.ident for each in world.store.log if isinstance(each, SaveSession)} == {"c-1"}


async def test_a_command_is_delivered_after_a_crash_although_the_own_token_is_refused_meanwhile(
    make_world: MakeWorld,
) -> None:
    world = await make_world(**OWN)
    world.controller.manners.acks = False
    agent = world.agent(cluster_id="c-1", token="good")
    assert await beat(agent) == 200
    await world.settle()
    world.controller.push("k1", cluster_id="c-1")
    await world.settle()
    await world.crash()
    world.controller.manners.dial = REFUSED
    world.start()
    await world.settle()
    assert await beat(agent) == 200, "nobody has told yet that the token is refused"
    await world.settle()
    assert await agent.poll() == ["k1"]
    assert await beat(agent) == 401
