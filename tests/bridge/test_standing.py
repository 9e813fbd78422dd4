"""How each agent stands with the controller, as far as its heartbeats and registrations show it."""

from __future__ import annotations

import msgspec
import pytest

from shim.core.standing import SessionStanding, TroubleKind
from tests.bridge.conftest import MakeWorld
from tests.support.world import Agent, World


async def answered_with(world: World, agent: Agent, text: str) -> None:
    """The agent heartbeats, and the controller answers with an error."""
    world.controller.manners.acks = False
    before = len(world.controller.log)
    await agent.heartbeat()
    await world.settle()
    for beat in world.controller.got("heartbeat", before):
        world.controller.socket.says("error", {"error": text}, beat.request_id)
    await world.settle()


def trouble(world: World, ident: str) -> TroubleKind | None:
    found = world.session(ident).standing.trouble
    return None if found is None else found.kind


async def test_an_unknown_agent_without_a_name_stays_in_trouble_until_it_is_acknowledged(world: World) -> None:
    agent = world.agent(cluster_id="c-saved")
    for _ in range(3):
        await answered_with(world, agent, "cluster not found")
        assert trouble(world, "c-saved") is TroubleKind.NAME_UNKNOWN
        await world.pass_s(30)
    world.controller.manners.acks = True
    await agent.heartbeat()
    await world.settle()
    assert trouble(world, "c-saved") is None


async def test_an_agent_of_the_first_generation_without_a_name_is_in_trouble_before_any_heartbeat(
    world: World,
) -> None:
    agent = world.agent(dialect="agents", agent_id="a-1")
    await agent.poll()
    await world.settle()
    assert trouble(world, "a-1") is TroubleKind.NAME_UNKNOWN
    await agent.heartbeat()  # which names its cluster
    await world.settle()
    assert trouble(world, "a-1") is None


async def test_an_unknown_agent_with_a_name_is_in_trouble_until_its_registration(make_world: MakeWorld) -> None:
    world = await make_world(identity={"name": "configured"})
    agent = world.agent(cluster_id="c-saved")
    world.controller.manners.registers = False
    await answered_with(world, agent, "cluster not registered")
    assert trouble(world, "c-saved") is TroubleKind.UNKNOWN
    world.controller.answer_register()
    await world.settle()
    assert trouble(world, "c-saved") is None


async def test_registrations_that_change_nothing_do_not_hide_that_the_agent_is_unknown(make_world: MakeWorld) -> None:
    world = await make_world(identity={"name": "configured"})
    world.controller.manners.acks = False
    agent = world.agent(cluster_id="c-saved")
    began, refused = world.clock.monotonic_s(), 0
    for _ in range(4):
        await agent.heartbeat()
        await world.settle()
        while waiting := world.controller.got("heartbeat")[refused:]:  # a registration is followed by a heartbeat
            refused += len(waiting)
            for beat in waiting:
                world.controller.socket.says("error", {"error": "cluster not found"}, beat.request_id)
            await world.settle()
        found = world.session("c-saved").standing.trouble
        assert found is not None
        assert found.since <= began
        await world.pass_s(30)
    assert len(world.controller.got("register")) >= 2


def test_a_trouble_is_over_when_a_heartbeat_after_the_registration_is_not_refused() -> None:
    standing = SessionStanding()
    standing.sent(0.0, connection=1)
    standing.fail(TroubleKind.UNKNOWN, "cluster not found", 1.0)
    standing.registered()
    standing.sent(2.0, connection=1)
    standing.sent(30.0, connection=1)  # a controller that acknowledges nothing
    assert standing.trouble is None
    standing.fail(TroubleKind.UNKNOWN, "cluster not found", 500.0)
    assert standing.trouble is not None
    assert standing.trouble.since == 500.0


async def test_heartbeats_that_are_refused_for_another_reason_have_its_text(world: World) -> None:
    agent = world.agent(cluster_id="c-saved")
    await answered_with(world, agent, "quota exceeded")
    found = world.session("c-saved").standing.trouble
    assert found is not None
    assert (found.kind, found.text) == (TroubleKind.HEARTBEATS_REFUSED, "quota exceeded")


@pytest.mark.parametrize("registered", [True, False])
async def test_heartbeats_that_nobody_acknowledges_are_noticed(world: World, registered: bool) -> None:
    agent = world.agent() if registered else world.agent(cluster_id="c-saved")
    if registered:
        await agent.register()
    world.controller.manners.acks = False
    await agent.live(50)
    assert world.bridge.heartbeats.unacknowledged() == []
    await agent.live(30)
    [(session, _)] = world.bridge.heartbeats.unacknowledged()
    assert session.key.ident == agent.cluster_id
    world.controller.manners.acks = True
    await agent.live(30)
    assert world.bridge.heartbeats.unacknowledged() == []


def test_a_new_connection_begins_to_count_anew() -> None:
    standing = SessionStanding()
    for at in (0.0, 30.0, 60.0):
        standing.sent(at, connection=1)
    assert standing.unacknowledged_since(60.0, 30.0) == 0.0
    standing.sent(61.0, connection=2)
    assert standing.unacknowledged_since(100.0, 30.0) is None


async def test_the_service_token_of_a_heartbeat_is_replayed_and_never_stored(world: World) -> None:
    agent = world.agent(dialect="clusters", agent_id="b3-agent")
    await agent.register("sa-token")
    await agent.heartbeat()
    await world.restart()
    assert world.session(agent.cluster_id).secret == ""
    await agent.outcome(msgspec.structs.replace(agent.heartbeat_call(), secret="sa-token"))
    await world.settle()
    [register] = world.controller.got("register")[1:]
    assert register.payload["k8s_service_token"] == "sa-token"
    assert "sa-token" not in repr(world.store.log)
