"""Registrations are answered in time, by whom they must be (docs/reference/protocol.md#11-register)."""

from __future__ import annotations

import asyncio

import pytest

from shim.core.agent_calls import Failed, Outcome, RegisterCall, Registered
from shim.ports import DialFailure
from tests.bridge.conftest import MakeWorld, living
from tests.support.upstream import GONE, REFUSED
from tests.support.world import Agent, World


def registering(agent: Agent, secret: str = "") -> asyncio.Task[Outcome]:
    return asyncio.get_running_loop().create_task(agent.register(secret))


async def answered_after(world: World, agent: Agent) -> tuple[Outcome, float]:
    start = world.now
    outcome = await agent.register()
    return outcome, world.now - start


async def test_the_controllers_answer_reaches_the_agent(world: World) -> None:
    agent = world.agent()
    outcome = await agent.register("sa-token")
    assert outcome == Registered(
        cluster_id="c-1", cluster_uuid="uuid-c-1", name="prod", agent_id="pod-1", workspace_id=7
    )
    [sent] = world.controller.got("register")
    assert sent.payload == {
        "agent_id": "pod-1",
        "name": "prod",
        "k8s_version": "v1.28.3",
        "k8s_service_token": "sa-token",
    }
    assert sent.request_id


async def test_the_service_token_is_never_stored(world: World) -> None:
    await world.agent().register("sa-token")
    await world.settle()
    assert "sa-token" not in repr(world.store.log)


async def test_an_agent_that_calls_before_the_link_is_up_waits_for_it(make_world: MakeWorld) -> None:
    world = await make_world()
    world.controller.go_away()
    await world.pass_s(1)
    agent = registering(world.agent())
    await world.pass_s(2)
    assert not agent.done()
    world.controller.come_back()
    assert isinstance(await agent, Registered)


async def test_the_deadline_counts_from_the_requests_first_byte(world: World) -> None:
    world.controller.manners.registers = False
    agent = world.agent()
    call = RegisterCall("clusters_agent", "pod-1", "prod", {"agent_id": "pod-1", "name": "prod"})
    start = world.now
    answer = await agent.call(call, arrived_s=start - 4)
    assert world.now == pytest.approx(start + 21)
    assert isinstance(answer.outcome, Failed)
    assert answer.outcome.status == 503
    assert answer.outcome.retry_after_s is not None


async def test_a_late_result_serves_the_next_attempt_at_once(world: World) -> None:
    world.controller.manners.registers = False
    agent = world.agent()
    outcome = await agent.register()
    assert isinstance(outcome, Failed)
    await world.pass_s(10)
    world.controller.answer_register()
    await world.settle()
    other = world.agent(agent_id="pod-2")
    outcome, took_s = await answered_after(world, other)
    assert took_s == 0
    assert isinstance(outcome, Registered)
    assert not outcome.cached
    assert outcome.agent_id == "pod-2", "and it is told its own id"
    assert len(world.controller.got("register")) == 1


async def test_a_late_result_is_not_kept_for_ever(world: World) -> None:
    world.controller.manners.registers = False
    agent = world.agent()
    await agent.register()
    world.controller.answer_register()
    world.controller.manners.registers = True
    await world.pass_s(601)
    await agent.register()
    assert len(world.controller.got("register")) == 2


async def test_concurrent_registers_of_one_identity_share_one_request(world: World) -> None:
    world.controller.manners.registers = False
    first, second = registering(world.agent()), registering(world.agent(agent_id="pod-2"))
    stranger = registering(world.agent(agent_id="pod-3", name="other"))
    await world.settle()
    assert len(world.controller.got("register")) == 2
    world.controller.answer_register()
    world.controller.answer_register()
    outcomes = [await task for task in (first, second, stranger)]
    assert [getattr(outcome, "agent_id", "") for outcome in outcomes] == ["pod-1", "pod-2", "pod-3"]
    assert [getattr(outcome, "cluster_id", "") for outcome in outcomes] == ["c-1", "c-1", "c-2"]
    assert world.bridge.ctx.sessions.alias("default", "pod-2") is world.session("c-1")


async def test_an_agent_that_hangs_up_leaves_the_registration_to_the_next(world: World) -> None:
    world.controller.manners.registers = False
    agent = registering(world.agent())
    await world.settle()
    agent.cancel()
    await world.pass_s(1)
    world.controller.answer_register()
    await world.settle()
    _, took_s = await answered_after(world, world.agent())
    assert took_s == 0
    assert len(world.controller.got("register")) == 1


async def test_register_in_progress_keeps_waiting(world: World) -> None:
    world.controller.manners.registers = False
    agent = registering(world.agent())
    await world.settle()
    [sent] = world.controller.got("register")
    for _ in range(4):
        world.controller.socket.says("register_in_progress", {}, sent.request_id)
        await world.pass_s(5)
    assert not agent.done()
    world.controller.answer_register()
    assert isinstance(await agent, Registered)


async def test_a_request_that_is_never_answered_is_made_again_a_minute_later(world: World) -> None:
    world.controller.manners.registers = False
    agent = world.agent()
    await agent.register()
    await world.pass_s(20)
    retry = registering(agent)
    await world.settle()
    assert len(world.controller.got("register")) == 1, "the first is still under way"
    await retry
    retry = registering(agent)
    await world.settle()
    assert len(world.controller.got("register")) == 2
    world.controller.answer_register()  # the first request, after all
    assert isinstance(await retry, Registered)


# --- from the store ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["clusters_agent", "agents"])
async def test_a_stored_registration_is_answered_after_five_seconds(make_world: MakeWorld, dialect: str) -> None:
    world = await make_world()
    await world.agent(dialect=dialect).register()
    await world.restart()
    world.controller.manners.registers = False
    await world.pass_s(30)
    outcome, took_s = await answered_after(world, world.agent(dialect=dialect))
    assert took_s == pytest.approx(5)
    assert outcome == Registered("c-1", "uuid-c-1", "prod", "pod-1", workspace_id=7, cached=True)


async def test_so_it_is_when_the_link_is_down(world: World) -> None:
    await world.agent().register()
    world.controller.go_away()
    await world.pass_s(60)
    outcome, took_s = await answered_after(world, world.agent(agent_id="pod-2"))
    assert took_s == pytest.approx(5)
    assert isinstance(outcome, Registered)
    assert (outcome.cached, outcome.agent_id) == (True, "pod-2")


async def test_an_agent_of_another_cluster_name_has_nothing_in_the_store(world: World) -> None:
    await world.agent().register()
    world.controller.go_away()
    await world.settle()
    outcome, took_s = await answered_after(world, world.agent(name="other"))
    assert took_s == pytest.approx(25)
    assert isinstance(outcome, Failed)


async def test_a_new_agent_id_of_dialect_agents_is_served_by_cluster_name_and_vouches_for_nobody(world: World) -> None:
    await world.agent(dialect="agents", agent_id="a-1").register()
    world.controller.go_away()
    await world.pass_s(60)
    outcome, _ = await answered_after(world, world.agent(dialect="agents", agent_id="a-2"))
    assert isinstance(outcome, Registered)
    assert (outcome.cached, outcome.agent_id, outcome.cluster_id) == (True, "a-2", "c-1")
    assert not world.session("a-1").fresh(world.now)


async def test_the_upstream_registration_goes_on_after_a_cached_answer(world: World) -> None:
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    await world.pass_s(60)
    agent.extra = {"k8s_version": "v1.30.0"}
    await agent.register()
    world.controller.come_back()
    await world.pass_s(10)
    assert world.session("c-1").registration["k8s_version"] == "v1.30.0"


async def test_an_agent_that_was_answered_from_the_store_keeps_its_id_if_the_controller_gives_another_one(
    world: World,
) -> None:
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    await world.pass_s(60)
    outcome = await agent.register()
    assert isinstance(outcome, Registered)
    assert (outcome.cached, outcome.cluster_id) == (True, "c-1")
    world.controller.manners.cluster_id = lambda payload: "c-new"
    world.controller.come_back()
    await world.pass_s(10)
    world.controller.push("k1", cluster_id="c-new")
    await world.settle()
    assert await agent.poll() == ["k1"]
    assert [str(each.key) for each in world.bridge.ctx.sessions] == ["default/cluster/c-1"]


async def test_the_replayed_registration_of_an_old_pod_does_not_take_over_the_new_one(world: World) -> None:
    old, new = world.agent(), world.agent(agent_id="pod-2")
    await old.register()
    world.controller.manners.cluster_id = lambda payload: "c-2"
    await new.register()
    await old.heartbeat()
    await world.pass_s(1)
    await new.heartbeat()
    world.controller.manners.cluster_id = lambda payload: "c-3"  # it has lost its database
    world.controller.go_away()
    await world.pass_s(15)
    assert getattr(await new.register(), "cluster_id", "") == "c-2"
    world.controller.come_back()
    await world.pass_s(20)
    await old.heartbeat()
    await world.pass_s(300)
    await new.heartbeat()
    await world.pass_s(20)
    world.controller.push("k1", cluster_id="c-3")
    await world.settle()
    assert await new.poll() == ["k1"]
    assert [each.key.ident for each in world.bridge.ctx.sessions] == ["c-2"]


@pytest.mark.parametrize("token, called", [("own-1", False), ("own-1", True), ("own-2", True)])
async def test_a_new_pod_takes_over_although_the_old_one_still_calls(
    make_world: MakeWorld, token: str, called: bool
) -> None:
    """A rolling update: the controller answers the new pod late, and the old one has called last."""
    world = await make_world(upstream={"token": ""})
    world.controller.manners.cluster_id = lambda payload: "c-1"
    old = await living(world, dialect="agents", agent_id="a-1", token="own-1")
    world.controller.push("k1", agent_id="a-1")
    world.controller.manners.registers = False
    new = world.agent(dialect="agents", agent_id="a-2", token=token)
    await new.register()
    if called:
        await new.heartbeat()
    await world.pass_s(1)
    await old.heartbeat()
    world.controller.answer_register()
    await new.live(60)
    assert await new.poll() == ["k1"]
    world.controller.push("k2", cluster_id="c-1")
    await world.settle()
    assert await new.poll() == ["k2"]
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]


async def test_a_pod_that_has_gone_does_not_take_over_from_its_successor(make_world: MakeWorld) -> None:
    """It was answered from the store, called for a while, and ended; the controller answers it after its successor."""
    world = await make_world(upstream={"token": ""})
    world.controller.manners.cluster_id = lambda payload: "c-1"
    await living(world, dialect="agents", agent_id="a-1", token="own-1")
    world.controller.push("k1", agent_id="a-1")
    world.controller.manners.registers = False
    gone, new = (world.agent(dialect="agents", agent_id=agent_id, token="own-1") for agent_id in ("a-2", "a-3"))
    await gone.register()
    await gone.heartbeat()
    await world.pass_s(1)
    registering = world.loop.create_task(new.register())
    await world.settle()
    world.controller.held_registers.rotate()
    world.controller.answer_register()
    await registering
    world.controller.answer_register()
    await new.live(100)
    assert await new.poll() == ["k1"]
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-3"]


@pytest.mark.parametrize("dialect", ["clusters_agent", "agents"])
async def test_so_does_one_with_a_new_token_that_registers_again(make_world: MakeWorld, dialect: str) -> None:
    """It had given up before the controller answered; its second attempt gets that answer."""
    world = await make_world(upstream={"token": ""})
    world.controller.manners.cluster_id = lambda payload: "c-1"
    old = await living(world, dialect=dialect, agent_id="a-1", token="own-1")
    world.controller.push("k1", agent_id="a-1")
    world.controller.manners.registers = False
    new = world.agent(dialect=dialect, agent_id="a-2", token="own-2")
    given_up = world.loop.create_task(new.register())
    await world.settle()
    given_up.cancel()
    await world.pass_s(1)
    await old.heartbeat()
    world.controller.answer_register()
    await world.settle()
    await new.register()
    await new.live(60)
    assert await new.poll() == ["k1"]
    assert [session.agent_id for session in world.bridge.ctx.sessions] == ["a-2"]


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_nor_does_an_old_pod_whose_registration_was_answered_after_it_had_gone(world: World) -> None:
    """The answer came later than the last call of the new pod, and the old one will never call again."""
    new = await living(world, dialect="agents", agent_id="a-2")
    world.controller.manners.registers = False
    old = world.loop.create_task(world.agent(dialect="agents", agent_id="a-1").register())
    await world.settle()
    old.cancel()
    await world.pass_s(5)
    world.controller.manners.cluster_id = lambda payload: "c-9"
    world.controller.answer_register()
    await world.settle()
    world.controller.push("k1", cluster_id="c-9")
    await world.settle()
    world.controller.manners.registers = True
    world.controller.socket.lose()
    await world.until(lambda: world.session("a-2").upstream_cluster_id == "c-9")
    await new.live(10)
    assert await new.poll() == ["k1"]
    assert [session.key.ident for session in world.bridge.ctx.sessions] == ["a-2"]


@pytest.mark.parametrize("token", ["own-1", "own-2"])
async def test_nor_does_its_late_answer_while_the_new_pod_lives(make_world: MakeWorld, token: str) -> None:
    world = await make_world(upstream={"token": ""})
    world.controller.manners.cluster_id = lambda payload: "c-1"
    new = await living(world, dialect="agents", agent_id="a-2", token="own-2")
    world.controller.push("k1", agent_id="a-2")
    world.controller.manners.registers = False
    old = world.loop.create_task(world.agent(dialect="agents", agent_id="a-1", token=token).register())
    await world.settle()
    old.cancel()
    await world.pass_s(1)
    await new.heartbeat()
    world.controller.answer_register()
    await world.settle()
    await world.crash()
    world.start()
    await world.pass_s(10)
    assert await new.poll() == ["k1"]


async def test_the_repeated_registration_of_an_old_token_does_not_take_over_the_new_ones(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": ""})
    world.controller.manners.cluster_id = lambda payload: "c-1"
    await living(world, dialect="agents", agent_id="a-1", token="own-1")
    old_link = world.controller.socket
    await world.pass_s(1)
    world.controller.manners.cluster_id = lambda payload: "c-2"  # it has lost its database
    new = await living(world, dialect="agents", agent_id="a-2", token="own-2")
    world.controller.push("k1", agent_id="a-2")
    old_link.lose()
    await world.until(lambda: world.session("a-1").upstream_cluster_id == "c-2")
    await world.crash()
    world.start()
    await world.pass_s(10)
    assert await new.poll() == ["k1"]


async def test_a_refused_token_is_told_at_once_and_nothing_cached_is_given(world: World) -> None:
    await world.agent().register()
    world.controller.go_away(REFUSED)
    await world.pass_s(20)
    outcome, took_s = await answered_after(world, world.agent())
    assert took_s < 1
    assert isinstance(outcome, Failed)
    assert outcome.status == 401


async def test_a_registration_that_waits_is_told_of_the_refusal(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": ""})
    world.controller.manners.hangs = True
    agent = registering(world.agent(token="own"))
    await world.settle()
    for dial in world.controller.dials:
        dial.fail(REFUSED)
    await world.settle()
    world.controller.dials[-1].fail(REFUSED)
    outcome = await agent
    assert isinstance(outcome, Failed)
    assert outcome.status == 401


@pytest.mark.parametrize(
    "error, status",
    [
        ({"error": "Unauthorized"}, 401),
        ({"error": "cluster name already in use", "cluster_id": "c-9"}, 409),
        ({"error": "name is required"}, 400),
        ({"error": "exploded"}, 502),
        ({"error": "exploded", "code": 409}, 409),
    ],
)
async def test_an_error_goes_to_the_agent_at_once(world: World, error: dict[str, object], status: int) -> None:
    world.controller.manners.registers = False
    agent = registering(world.agent())
    await world.settle()
    [sent] = world.controller.got("register")
    world.controller.socket.says("error", error, sent.request_id)
    await world.settle()
    outcome = agent.result()
    assert isinstance(outcome, Failed)
    assert (outcome.status, outcome.cluster_id) == (status, error.get("cluster_id", ""))


async def test_an_error_text_never_passes_on_a_secret(world: World) -> None:
    world.controller.manners.registers = False
    agent = registering(world.agent(), secret="sa-secret")
    await world.settle()
    [sent] = world.controller.got("register")
    world.controller.socket.says("error", {"error": "invalid token sa-secret"}, sent.request_id)
    outcome = await agent
    assert isinstance(outcome, Failed)
    assert "sa-secret" not in outcome.error
    assert outcome.status == 401


@pytest.mark.parametrize("lead", ["", "bad token: ", "x" * 150, "x" * 199])
async def test_an_error_text_with_a_long_secret_is_masked_before_it_is_cut(world: World, lead: str) -> None:
    secret = "sa-" + "S3cr3t" * 40
    world.controller.manners.registers = False
    agent = registering(world.agent(), secret=secret)
    await world.settle()
    [sent] = world.controller.got("register")
    world.controller.socket.says("error", {"error": f"{lead}{secret} is invalid"}, sent.request_id)
    outcome = await agent
    assert isinstance(outcome, Failed)
    assert "S3cr3t" not in outcome.error
    assert outcome.error.startswith(f"{lead}***"[:200])


@pytest.mark.parametrize("cluster_id", ["", "a/b", ".."])
async def test_a_success_without_a_usable_id_is_none(world: World, cluster_id: str) -> None:
    world.controller.manners.cluster_id = lambda payload: cluster_id
    outcome = await world.agent().register()
    assert isinstance(outcome, Failed)
    assert outcome.status == 502
    assert len(world.bridge.ctx.sessions) == 0


async def test_an_answer_to_nobodys_request_is_ignored(world: World) -> None:
    world.controller.socket.says("register_success", {"cluster_id": "c-9"}, "foreign")
    await world.settle()
    assert len(world.bridge.ctx.sessions) == 0


# --- hurrying ---------------------------------------------------------------------------------------------------------


async def test_a_register_cuts_a_backoff_short_but_not_more_than_once_in_five_seconds(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"reconnect": {"initial_s": 60, "max_s": 60}})
    world.controller.go_away()
    await world.pass_s(1)
    dials = len(world.controller.dials)
    tasks = [registering(world.agent(name=f"n{n}")) for n in range(3)]
    await world.settle()
    assert len(world.controller.dials) == dials + 1
    await world.pass_s(4.9)
    tasks.append(registering(world.agent(name="n3")))
    await world.settle()
    assert len(world.controller.dials) == dials + 1
    await world.pass_s(0.2)
    tasks.append(registering(world.agent(name="n4")))
    await world.settle()
    assert len(world.controller.dials) == dials + 2
    for task in tasks:
        task.cancel()


async def test_a_register_never_goes_against_retry_after(world: World) -> None:
    world.controller.go_away(DialFailure("status", 429, 30.0))
    await world.pass_s(6)
    dials = len(world.controller.dials)
    outcome, _ = await answered_after(world, world.agent())
    assert isinstance(outcome, Failed)
    assert outcome.status == 503
    assert len(world.controller.dials) == dials


# --- stopping ---------------------------------------------------------------------------------------------------------


async def test_stopping_answers_registrations_that_wait(world: World) -> None:
    world.controller.manners.registers = False
    agent = registering(world.agent())
    await world.settle()
    world.bridge.quiesce()
    await world.settle()
    outcome = agent.result()
    assert isinstance(outcome, Failed)
    assert outcome.status == 503
    outcome, took_s = await answered_after(world, world.agent())
    assert isinstance(outcome, Failed)
    assert took_s == 0


async def test_a_registration_in_flight_is_sent_again_after_a_loss(world: World) -> None:
    world.controller.manners.registers = False
    agent = registering(world.agent())
    await world.settle()
    world.controller.socket.lose()
    world.controller.manners.registers = True
    await world.settle()
    assert not agent.done()
    assert isinstance(await agent, Registered)
    assert len(world.controller.got("register")) == 2


async def test_a_replay_that_a_loss_cuts_off_registers_no_agent_that_died_meanwhile(world: World) -> None:
    await living(world, agent_id="dying", name="one")
    other = await living(world, agent_id="living", name="two")
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.pass_s(3)
    assert registered(world) == ["dying", "living"] * 2
    world.controller.go_away()
    await other.live(150)
    world.controller.manners.registers = True
    world.controller.come_back()
    await other.live(60)
    assert registered(world) == ["dying", "living"] * 2 + ["living"]


def registered(world: World) -> list[str]:
    """The agents of all registrations that the controller got, in order."""
    return [message.payload["agent_id"] for message in world.controller.got("register")]


async def test_a_link_that_cannot_come_up_is_named_in_time(world: World) -> None:
    world.controller.go_away(GONE)
    await world.settle()
    outcome, took_s = await answered_after(world, world.agent())
    assert isinstance(outcome, Failed)
    assert outcome.status == 503
    assert took_s == pytest.approx(25)


async def test_a_replay_under_way_serves_the_agent_that_registers_meanwhile(world: World) -> None:
    agent = world.agent()
    await agent.register()
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.pass_s(3)
    again = world.agent(agent_id="pod-2")
    again.extra = {"k8s_version": "v1.30.0"}
    task = registering(again, "new-secret")
    await world.settle()
    assert len(world.controller.got("register")) == 2, "it waits for the replay's answer"
    world.controller.answer_register()
    outcome = await task
    assert isinstance(outcome, Registered)
    assert outcome.agent_id == "pod-2"
    session = world.session("c-1")
    assert (session.registration["k8s_version"], session.secret) == ("v1.30.0", "new-secret")


async def test_a_registration_moves_to_the_link_that_its_agent_gets(make_world: MakeWorld) -> None:
    """Its first link had to make room for others while nobody waited any more."""
    world = await make_world(upstream={"token": "", "max_links": 1})
    world.controller.manners.registers = False
    agent = world.agent(token="one")
    await agent.register()
    await world.pass_s(100)
    await world.agent(token="two", cluster_id="c-9").heartbeat()
    await world.pass_s(200)
    world.controller.manners.registers = True
    assert isinstance(await agent.register(), Registered)


async def test_unanswered_registrations_are_not_kept_for_ever(world: World) -> None:
    world.controller.manners.registers = False
    for number in range(5):
        task = registering(world.agent(name=f"n{number}"))
        await world.settle()
        task.cancel()
    await world.pass_s(700)
    assert not world.bridge.registrations._by_identity
    assert not world.bridge.registrations._by_request


# --- what the controller refuses --------------------------------------------------------------------------------------


async def refused_with(world: World, agent: Agent, **payload: object) -> Outcome:
    """The agent registers, and the controller answers with an error."""
    world.controller.manners.registers = False
    task = registering(agent, "sa-token")
    await world.settle()
    socket, message = world.controller.held_registers.popleft()
    socket.says("error", dict(payload), message.request_id)
    return await task


async def test_what_a_conflict_with_an_id_tells_is_kept_as_after_a_success(world: World) -> None:
    agent = world.agent()
    outcome = await refused_with(world, agent, error="name already taken", code=409, cluster_id="c-old")
    assert outcome == Failed(409, "name already taken", cluster_id="c-old")
    assert world.bridge.registrations.refusals == []
    agent.cluster_id = "c-old"
    await agent.heartbeat()
    await world.restart()
    await agent.heartbeat()
    await world.settle()
    [replayed] = world.controller.got("register")[1:]
    assert (replayed.payload["name"], replayed.payload["cluster_id"]) == ("prod", "c-old")
    assert replayed.payload["k8s_version"] == "v1.28.3"


async def test_a_replayed_registration_gives_no_session_to_another_owner(make_world: MakeWorld) -> None:
    """Whoever calls with a cluster's id is adopted, but has not shown that its token may use the id."""
    world = await make_world(upstream={"token": ""})
    mine = world.agent(token="token-a")
    await mine.register()
    await mine.heartbeat()
    world.controller.push("k1", cluster_id=mine.cluster_id)
    thief = world.agent(token="token-b", agent_id="pod-2", cluster_id=mine.cluster_id)
    await world.pass_s(1)
    await thief.heartbeat()
    world.controller.go_away()
    await world.pass_s(5)
    world.controller.come_back()
    await world.pass_s(20)
    await thief.live(200)  # the other one is silent, and would give way now
    assert await thief.poll() == []
    assert await mine.poll() == ["k1"]


async def test_a_conflict_takes_no_session_from_another_owner(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": ""})
    first, second = world.agent(token="token-a"), world.agent(token="token-b", agent_id="pod-2")
    await first.register()
    await first.heartbeat()
    world.controller.push("k1", cluster_id=first.cluster_id)
    await world.pass_s(100)  # it is not fresh any more, and would give way at once
    await refused_with(world, second, error="already exists", code=409, cluster_id=first.cluster_id)
    await world.pass_s(5)
    assert await first.poll() == ["k1"]


@pytest.mark.parametrize(
    "payload, status",
    [
        ({"error": "name is required"}, 400),
        ({"error": "no permission", "code": 403}, 401),
        ({"error": "already taken"}, 409),
        ({"error": "a defect"}, 502),
    ],
)
async def test_a_refused_registration_is_remembered_until_it_is_accepted(
    world: World, payload: dict[str, object], status: int
) -> None:
    agent = world.agent()
    outcome = await refused_with(world, agent, **payload)
    assert isinstance(outcome, Failed)
    [refusal] = world.bridge.registrations.refusals
    assert (refusal.name, refusal.agent, refusal.status, refusal.error) == (
        "prod",
        "pod-1",
        status,
        payload["error"],
    )
    world.controller.manners.registers = True
    await agent.register()
    assert world.bridge.registrations.refusals == []


async def test_a_refusal_that_nobody_repeats_is_forgotten(world: World) -> None:
    await refused_with(world, world.agent(), error="name is required")
    await world.pass_s(950)
    assert world.bridge.registrations.refusals == []


async def test_a_registration_without_an_answer_is_remembered_too(world: World) -> None:
    world.controller.manners.registers = False
    task = registering(world.agent())
    await world.pass_s(11)
    [refusal] = world.bridge.registrations.refusals
    assert (refusal.name, refusal.status) == ("prod", 0)
    world.controller.answer_register()
    assert isinstance(await task, Registered)
    assert world.bridge.registrations.refusals == []
