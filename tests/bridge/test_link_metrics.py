"""The metrics of the guide's four objectives (docs/reference/metrics.md), on a whole bridge in virtual time."""

from __future__ import annotations

import pytest

from shim.ports import DialFailure
from tests.bridge.conftest import MakeWorld
from tests.support.upstream import GONE, REFUSED
from tests.support.world import World


def attempts(world: World) -> tuple[float, float, float]:
    """(ok, failed, away)"""
    ok, failed, away = (
        world.metric("connection_attempts_total", outcome=outcome) for outcome in ("ok", "failed", "away")
    )
    return ok, failed, away


def heartbeats(world: World) -> tuple[float, float, float]:
    """(acked, written, missed)"""
    acked, written, missed = (
        world.metric("agent_heartbeats_total", outcome=outcome) for outcome in ("acked", "written", "missed")
    )
    return acked, written, missed


# --- connection success -----------------------------------------------------------------------------------------------


async def test_attempts_while_the_controller_is_away_are_no_failures(world: World) -> None:
    assert attempts(world) == (1, 0, 0)
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    await agent.live(30)
    ok, failed, away = attempts(world)
    assert (ok, failed) == (1, 0)
    assert away > 3
    world.controller.come_back()
    await agent.live(10)
    assert attempts(world)[:2] == (2, 0)
    assert world.metric("upstream_retries_total", reason="tcp") == away
    assert world.metric("upstream_retries_total", reason="lost") == 1
    assert world.metric("upstream_early_disconnects_total") == 1  # it had been open for less than 30 s


@pytest.mark.parametrize(
    "failure, away",
    [(DialFailure("status", 503), True), (DialFailure("tls"), False), (DialFailure("status", 429), False)],
)
async def test_what_answers_decides_whether_the_controller_was_there(
    failure: DialFailure, away: bool, make_world: MakeWorld
) -> None:
    world = await make_world()
    agent = world.agent()
    await agent.register()
    world.controller.go_away(failure)
    await agent.live(20)
    _, failed, gone = attempts(world)
    assert (failed > 0, gone > 0) == (not away, away)


async def test_a_refused_token_is_one_failed_attempt_however_many_ways_are_tried(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"auth": "auto"})
    world.controller.go_away(REFUSED)
    await world.until(lambda: world.metric("upstream_dials_total", outcome="http_401") >= 2)
    assert attempts(world) == (1, 1, 0)


async def test_no_answer_is_a_failure_where_another_link_hears_the_controller(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": "", "url": "https://api.vendor.test"})
    one, two = world.agent(token="tok-1"), world.agent(token="tok-2", agent_id="pod-2", name="stage")
    await one.register()
    await two.register()
    first, second = world.controller.sockets
    world.controller.manners.refuse = lambda spec: DialFailure("timeout") if spec.token == "tok-2" else None
    world.controller.manners.hangs = True  # the dial of the second takes time
    second.lose()
    await world.until(lambda: len(world.controller.dials) == 3, step_s=0.01)
    await world.pass_s(1)
    first.frame()
    await world.settle()
    world.controller.dials[2].fail(DialFailure("timeout"))
    await world.settle()
    assert attempts(world) == (2, 1, 0)
    world.controller.manners.hangs = False


async def test_a_connection_that_is_closed_before_it_is_online_failed(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    world.controller.manners.registers = False
    world.controller.socket.lose()
    await world.controller.until("register", 2)  # the replay, which is not answered
    world.controller.socket.lose(by_close_frame=True, code=1011)
    await world.settle()
    assert attempts(world) == (1, 1, 0)
    world.controller.manners.registers = True


# --- reconnection -----------------------------------------------------------------------------------------------------


async def test_reconnection_is_told_from_the_loss_and_from_the_return(world: World) -> None:
    agent = world.agent()
    await agent.register()
    world.controller.go_away()
    lost_at = world.now
    await agent.live(120)
    returned_at = world.now
    world.controller.come_back()
    await world.until(lambda: world.metric("upstream_reconnect_seconds_count") == 1, step_s=0.01)
    online_at = world.now
    assert world.metric("upstream_reconnect_seconds_sum") == pytest.approx(online_at - lost_at, abs=0.1)
    bound_s = world.metric("upstream_reconnect_after_return_seconds_sum")
    assert online_at - returned_at <= bound_s + 0.1
    assert bound_s <= 10
    assert world.metric("upstream_reconnect_after_return_seconds_bucket", le="10.0") == 1


async def test_where_the_controller_refused_its_return_says_nothing(world: World) -> None:
    agent = world.agent()
    await agent.register()
    world.controller.go_away(DialFailure("status", 429, retry_after_s=40))
    await agent.live(5)
    world.controller.come_back()
    await agent.live(90)
    assert world.metric("upstream_reconnect_seconds_count") == 1
    assert world.metric("upstream_reconnect_after_return_seconds_count") == 0


async def test_an_idle_link_that_is_dialled_again_was_not_lost(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await world.pass_s(300)
    assert not list(world.controller.open_sockets())
    await agent.heartbeat()
    await world.settle()
    assert len(world.controller.sockets) == 2
    assert world.metric("upstream_reconnect_seconds_count") == 0
    assert attempts(world) == (2, 0, 0)


# --- heartbeats -------------------------------------------------------------------------------------------------------


async def test_coalesced_heartbeats_are_covered_by_the_acknowledged_one(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(300)
    acked, written, missed = heartbeats(world)
    assert (acked, written, missed) == (60, 0, 0)
    assert world.metric("upstream_heartbeats_total", event="sent") < 15


async def test_an_agent_that_dies_leaves_nothing_uncovered(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(60)
    await world.pass_s(120)
    assert heartbeats(world)[2] == 0


async def test_heartbeats_during_an_outage_that_is_longer_than_the_interval_are_missed(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(60)
    before = sum(heartbeats(world))
    world.controller.go_away()
    await agent.live(120)  # 24 heartbeats, all answered with 204
    world.controller.come_back()
    await agent.live(60)
    await world.pass_s(40)
    acked, written, missed = heartbeats(world)
    assert written == 0
    assert acked + missed == before + 24 + 12
    assert 15 <= missed <= 20  # those of the last 30 s before the return were told in time


async def test_a_short_outage_costs_no_heartbeat(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(60)
    world.controller.go_away()
    await agent.live(10)
    world.controller.come_back()
    await agent.live(60)
    await world.pass_s(40)
    assert heartbeats(world)[2] == 0


async def test_where_the_controller_never_acknowledges_a_write_to_a_living_link_counts_as_such(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    world.controller.manners.acks = False
    agent = world.agent()
    await agent.register()
    await agent.live(120)
    await world.pass_s(40)
    assert heartbeats(world) == (0, 24, 0)


@pytest.mark.parametrize("named", [True, False])
async def test_a_heartbeat_that_was_refused_is_not_taken_for_written(world: World, named: bool) -> None:
    world.controller.manners.acks = False
    agent = world.agent(cluster_id="c-saved")  # without a name nothing can be mended
    for _ in range(5):
        before = len(world.controller.log)
        await agent.heartbeat()
        await world.settle()
        for beat in world.controller.got("heartbeat", before):
            world.controller.socket.says("error", {"error": "cluster not found"}, beat.request_id if named else "")
        await world.pass_s(30)
    await world.pass_s(40)
    assert heartbeats(world) == (0, 0, 5)


async def test_acknowledgements_that_stop_are_missed(world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.live(60)
    assert heartbeats(world)[2] == 0
    world.controller.manners.acks = False
    await agent.live(300)
    await world.pass_s(40)
    assert heartbeats(world)[1] == 0
    assert heartbeats(world)[2] > 40


async def test_an_agent_that_cannot_be_named_is_not_heard_of(world: World) -> None:
    agent = world.agent(dialect="agents", name="")
    for _ in range(10):
        await agent.heartbeat()
        await world.pass_s(5)
    await world.pass_s(40)
    assert heartbeats(world) == (0, 0, 10)


# --- message latency --------------------------------------------------------------------------------------------------


async def test_latency_is_that_of_messages_whose_way_is_open(make_world: MakeWorld) -> None:
    world = await make_world(poll={"hold": 20})
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    await world.settle()
    # no poll is held: it waits for the agent, and says nothing about the shim
    world.controller.push("k1", type="x", payload={})
    await world.pass_s(3)
    assert await agent.poll() == ["k1"]
    assert world.metric("message_latency_seconds_count", direction="down") == 0
    assert world.metric("command_hand_over_seconds_sum", dialect="clusters_agent") == pytest.approx(3, abs=0.1)
    # a poll is held
    task = world.loop.create_task(agent.poll())
    await world.pass_s(1)
    world.controller.push("k2", type="x", payload={})
    assert await task == ["k2"]
    assert world.metric("message_latency_seconds_count", direction="down") == 1
    assert world.metric("message_latency_seconds_bucket", direction="down", le="0.1") == 1
    # up: with the link there, and while it is away
    await agent.result("k1")
    await world.settle()
    assert world.metric("message_latency_seconds_count", direction="up") == 1
    world.controller.go_away(GONE)
    await world.settle()
    await agent.result("k2")
    world.controller.come_back()
    await agent.live(10)
    assert world.controller.results("k2")
    assert world.metric("message_latency_seconds_count", direction="up") == 1
    assert world.metric("results_total", kind="known", success="true") == 2
