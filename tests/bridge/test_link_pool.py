"""All links: owners and names, sharing, limits, idleness and removal.

Rules: docs/reference/protocol.md#16-owners-sessions-aliases, #21-link-life.
"""

from __future__ import annotations

from shim.core.agent_calls import Accepted, Failed
from shim.core.link_state import LinkState
from tests.bridge.conftest import MakeWorld
from tests.bridge.test_links import living, states
from tests.bridge.test_session_registry import OWN, beat, refuse, sessions
from tests.support.world import World


async def test_one_link_carries_all_sessions_of_a_token(world: World) -> None:
    for number in range(5):
        await living(world, name=f"n{number}", agent_id=f"pod-{number}")
    assert len(world.controller.dials) == 1


async def test_unshared_links_carry_one_session_each(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"share_link": False})
    assert not world.controller.dials
    one = await living(world, name="one", agent_id="pod-1")
    two = await living(world, name="two", agent_id="pod-2")
    assert len(world.controller.dials) == 2
    by_socket = [{s.message.payload.get("cluster_id", "") for s in world.controller.log if s.socket is socket}
                 for socket in world.controller.sockets]  # fmt: skip
    assert by_socket == [{"", one.cluster_id}, {"", two.cluster_id}]
    world.controller.sockets[0].says("command", {"id": "k1"})
    world.controller.sockets[1].says("command", {"id": "k2"})
    await world.settle()
    assert await one.poll() == ["k1"]
    assert await two.poll() == ["k2"]
    before = len(world.controller.log)
    world.controller.sockets[0].lose()
    await world.pass_s(3)
    replayed = world.controller.got("register", before)
    assert [message.payload["name"] for message in replayed] == ["one"]


async def test_an_unshared_session_keeps_its_link_after_a_restart(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"share_link": False})
    agent = await living(world)
    await world.restart()
    await agent.heartbeat()
    await agent.register()
    await world.settle()
    assert len(world.bridge.links) == 1
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == ["k1"]


async def test_the_next_link_above_the_limit_is_refused(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": "", "max_links": 2})
    agents = [await living(world, token=f"t{n}", name=f"n{n}") for n in range(2)]
    third = world.agent(token="t2", cluster_id="c-3")
    for outcome in (await third.heartbeat(), await third.register()):
        assert isinstance(outcome, Failed)
        assert (outcome.status, outcome.retry_after_s) == (503, 30)
    await world.pass_s(200)
    assert await third.heartbeat() == Accepted(), "idle links make room"
    assert await agents[0].heartbeat() == Accepted()


async def test_a_link_without_a_fresh_session_is_closed_and_dialled_at_the_next_call(world: World) -> None:
    agent = await living(world)
    first = world.controller.socket
    await world.pass_s(120)
    assert first.open, "35 s of freshness and 90 s without"
    await world.pass_s(15)
    assert first.closed_by_us == 1000
    assert states(world) == [LinkState.IDLE]
    await world.pass_s(1000)
    assert len(world.controller.dials) == 1
    before = len(world.controller.log)
    await agent.heartbeat()
    await world.settle()
    assert [sent.message.type for sent in world.controller.log[before:]] == ["register", "heartbeat"]


async def test_an_idle_link_can_be_kept(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"idle_close_s": 0})
    await world.pass_s(1000)
    assert states(world) == [LinkState.ONLINE]


async def test_a_dead_agents_result_keeps_the_link_dialling(world: World) -> None:
    agent = await living(world)
    world.controller.push("k1")
    await world.settle()
    await agent.poll()
    world.controller.go_away()
    await world.settle()
    await agent.result("k1")
    await world.pass_s(600)
    world.controller.come_back()
    await world.pass_s(10)
    assert len(world.controller.results("k1")) == 1


async def test_without_a_token_there_is_no_owner(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    outcome = await world.agent(token="", cluster_id="c-1").heartbeat()
    assert isinstance(outcome, Failed)
    assert outcome.status == 401
    assert not world.controller.dials


async def test_an_agents_token_is_masked_as_long_as_its_link_is_kept(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    refuse(world, "bad-token")
    redaction = world.bridge.ctx.redaction
    assert await beat(world.agent(cluster_id="c-9", token="bad-token")) == 200
    assert redaction.text("a line about bad-token") == "a line about ***"
    await world.pass_s(120)
    assert len(world.bridge.links) == 0
    assert redaction.text("a line about bad-token") == "a line about bad-token", "memory for tokens is bounded by links"


async def test_strangers_use_up_no_links_for_good(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": "", "max_links": 2})
    refuse(world, *(f"bad-{n}" for n in range(9)))
    for n in range(9):
        await beat(world.agent(cluster_id=f"c-{n}", token=f"bad-{n}"))
        await world.settle()
    assert len(world.bridge.links) == 2
    assert await beat(world.agent(cluster_id="c-mine", token="good")) == 200, "a refused token makes room at once"
    await world.settle()
    assert "c-mine" in sessions(world)
    assert await beat(world.agent(cluster_id="c-second", token="good-2")) == 200
    await world.settle()
    assert await beat(world.agent(cluster_id="c-third", token="good-3")) == 503, "accepted ones do not"
    await world.pass_s(90)
    assert sessions(world) == ["c-mine", "c-second"]


async def test_made_up_tokens_that_made_room_are_not_dialled_again_at_once(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": "", "max_links": 2, "auth": "header"})
    refuse(world, *(f"bad-{n}" for n in range(9)))
    strangers = [world.agent(cluster_id=f"c-{n}", token=f"bad-{n}") for n in range(9)]
    for _ in range(12):
        for stranger in strangers:
            await beat(stranger)
            await world.settle()
        await world.pass_s(5)
    assert len(world.controller.dials) <= 2 * len(strangers), "one dial a minute each"


async def test_a_removed_link_is_replaced_when_its_agent_calls_again(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": "", "max_links": 1})
    first = world.agent(token="t1", cluster_id="c-1")
    await first.heartbeat()
    session = world.session("c-1")
    removed = session.link
    await world.pass_s(200)
    await world.agent(token="t2", cluster_id="c-2").heartbeat()
    assert removed.stopped, "an idle link makes room"
    assert world.bridge.links.link_of(session) is None
    await world.pass_s(200)
    assert await first.heartbeat() == Accepted()
    assert session.link is not removed
    assert world.bridge.links.link_of(session) is session.link
