"""How many agents a token may have, and that nothing is kept of a token which the controller never accepted."""

from __future__ import annotations

from typing import Any

import pytest

from shim.bridge.session_registry import MAX_UNVERIFIED_SESSIONS
from shim.core.agent_calls import Accepted, Commands, Failed, Outcome, PollCall
from shim.core.records import SaveAlias, SaveSession
from shim.ports import DialFailure, DialRequest
from tests.bridge.conftest import MakeWorld
from tests.support.world import Agent, World

OWN: dict[str, Any] = {"upstream": {"token": ""}}
REFUSED = DialFailure("status", 401)


def refuse(world: World, *tokens: str) -> None:
    """The controller refuses these tokens."""

    def judge(spec: DialRequest) -> DialFailure | None:
        return REFUSED if spec.token in tokens else None

    world.controller.manners.refuse = judge


def status(outcome: Outcome) -> int:
    return outcome.status if isinstance(outcome, Failed) else 200


def stored(world: World) -> list[Any]:
    return [operation for operation in world.store.log if isinstance(operation, (SaveSession, SaveAlias))]


def sessions(world: World) -> list[str]:
    return sorted(session.key.ident for session in world.bridge.ctx.sessions)


async def beat(agent: Agent) -> int:
    return status(await agent.heartbeat())


async def polled(agent: Agent) -> Outcome:
    return await agent.outcome(PollCall(agent.dialect, agent.target))


# --- how many -----------------------------------------------------------------------------------------------------


async def test_an_owner_has_so_many_agents_and_the_next_is_refused(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"max_per_owner": 3})
    agents = [world.agent(cluster_id=f"c-{n}", agent_id=f"pod-{n}") for n in range(5)]
    assert [await beat(agent) for agent in agents] == [200, 200, 200, 503, 503]
    outcome = await agents[3].heartbeat()
    assert isinstance(outcome, Failed)
    assert outcome.error == "too many agents: see sessions.max_per_owner"
    assert outcome.retry_after_s
    assert sessions(world) == ["c-0", "c-1", "c-2"]
    assert await beat(agents[0]) == 200, "those that are known are served"
    assert world.metric("sessions_refused_total") == 3


async def test_an_agent_beyond_the_bound_is_not_registered_upstream_either(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"max_per_owner": 1})
    first, second = world.agent(name="one"), world.agent(name="two", agent_id="pod-2")
    assert status(await first.register()) == 200
    assert status(await second.register()) == 503
    assert status(await first.register()) == 200
    assert {message.payload["name"] for message in world.controller.got("register")} == {"one"}


async def test_polls_and_results_of_unknown_agents_count_too(make_world: MakeWorld) -> None:
    world = await make_world(sessions={"max_per_owner": 1})
    assert await beat(world.agent(cluster_id="c-1")) == 200
    other = world.agent(cluster_id="c-2")
    assert status(await polled(other)) == 503
    assert status(await other.result("k-1")) == 503


# --- agents' own tokens -------------------------------------------------------------------------------------------


async def test_a_refused_token_gets_401_and_nothing_of_it_is_kept(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    refuse(world, "bad")
    stranger = world.agent(cluster_id="c-9", token="bad")
    assert await beat(stranger) == 200, "what the controller thinks of it is not known yet"
    await world.settle()
    assert await beat(stranger) == 401
    assert status(await polled(stranger)) == 401
    assert status(await stranger.result("k-1")) == 401
    assert status(await stranger.register()) == 401
    assert stored(world) == []
    await world.pass_s(120)
    assert (len(world.bridge.links), sessions(world)) == (0, [])
    assert stored(world) == []


async def test_a_token_that_was_never_judged_has_few_agents_and_no_results_on_disk(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    world.controller.manners.dial = DialFailure("tcp")
    agents = [world.agent(cluster_id=f"c-{n}", token="new") for n in range(MAX_UNVERIFIED_SESSIONS + 1)]
    assert [await beat(agent) for agent in agents] == [200] * MAX_UNVERIFIED_SESSIONS + [503]
    assert status(await agents[0].result("k-1")) == 503
    assert stored(world) == []
    world.controller.come_back()
    await world.until(lambda: len(world.controller.sockets) == 1)
    await world.settle()
    kept = {each.record.key.ident for each in stored(world) if isinstance(each, SaveSession)}
    assert kept == {f"c-{n}" for n in range(MAX_UNVERIFIED_SESSIONS)}
    assert await beat(agents[-1]) == 200
    assert status(await agents[0].result("k-1")) == 200
    await world.restart()
    assert len(sessions(world)) == MAX_UNVERIFIED_SESSIONS + 1


async def test_a_known_agent_is_served_after_a_restart_although_its_token_is_refused_now(make_world: MakeWorld) -> None:
    world = await make_world(**OWN)
    agent = world.agent(token="mine")
    await agent.register()
    await agent.heartbeat()
    world.controller.push("k-1", cluster_id=agent.cluster_id)
    await world.settle()
    await world.restart()
    refuse(world, "mine")
    await beat(agent)
    await world.settle()
    assert await beat(agent) == 401
    assert await agent.poll() == ["k-1"]
    assert status(await agent.result("k-1")) == 200
    await world.pass_s(120)
    assert sessions(world) == [agent.cluster_id], "only what was adopted on an unproven token is forgotten"


@pytest.mark.parametrize("good", ["good", ""])
async def test_no_token_sees_another_tokens_agents(make_world: MakeWorld, good: str) -> None:
    world = await make_world(**OWN)
    mine, theirs = world.agent(token="mine"), world.agent(cluster_id="c-1", token=good)
    await mine.register()
    world.controller.push("k-1", cluster_id=mine.cluster_id)
    await world.settle()
    theirs.cluster_id = mine.cluster_id
    answer = await polled(theirs)
    assert answer == Commands((), 5) if good else status(answer) == 401
    assert isinstance(await mine.heartbeat(), Accepted)
