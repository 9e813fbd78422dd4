"""Timers: late ones, closed groups, deadlines behind one timer, and periodic tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from msgspec.structs import replace

from shim.bridge.context import DEFAULT_OWNER
from shim.bridge.scheduler import (
    AT_A_TIME,
    CROWD,
    EARLY,
    SLICE_S,
    TICK_S,
    DeadlineQueue,
    PeriodicTasks,
    in_slices,
)
from shim.core.records import SessionKey
from tests.support.virtual import FakeClock, FakeTimers
from tests.support.world import World


async def test_a_duty_that_fails_is_said_and_counted_and_the_others_go_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.has_defects = True
    done: list[str] = []

    def fails() -> None:
        done.append("fails")
        raise ValueError("a defect")

    PeriodicTasks(world.bridge.ctx, ((TICK_S, fails), (5 * TICK_S, lambda: done.append("rare")))).start()
    await world.pass_s(10.5 * TICK_S)
    assert done.count("fails") == 10
    assert done.count("rare") == 2
    assert world.metric("internal_errors_total", part="bridge") == 10
    assert [record.getMessage() for record in caplog.records].count("upkeep_failed") == 10


async def test_an_idle_bridge_is_woken_by_one_timer_and_by_its_link(world: World) -> None:
    world.bridge.links.get(DEFAULT_OWNER, DEFAULT_OWNER, "").ensure_connected(world.now)
    await world.pass_s(60)
    jumps = world.loop.jumps
    await world.pass_s(600)
    ticks, pings = 600 / TICK_S, 2 * 600 / world.settings.upstream.ping_interval_s
    assert world.loop.jumps - jumps <= ticks + pings + 2


# --- timers that are cancelled together -------------------------------------------------------------------------------


async def test_deadlines_are_met_in_order_of_time_and_then_of_arrival(world: World) -> None:
    met: list[str] = []
    key = SessionKey("o", "agent", "a")
    queue = DeadlineQueue(world.bridge.ctx)
    for delay_s, name in ((3.0, "c"), (1.0, "a"), (3.0, "d"), (2.0, "b")):
        queue.add(delay_s, lambda _, item: met.append(item), key, name)
    await world.pass_s(2.5)
    assert met == ["a", "b"]
    await world.pass_s(1)
    assert met == ["a", "b", "c", "d"]


async def test_deadlines_of_one_moment_are_spread_over_turns_of_the_loop(world: World) -> None:
    """All are due at once after the process stood still."""
    clock, timers = FakeClock(), FakeTimers()
    queue = DeadlineQueue(replace(world.bridge.ctx, clock=clock, timers=timers))
    met: list[int] = []
    for number in range(3 * AT_A_TIME):
        queue.add(1.0, lambda _, item: met.append(item), SessionKey("o", "agent", "a"), number)
    clock.now += 2.0
    counts = [0]
    while timers.calls:
        timers.calls.pop()[1]()
        counts.append(len(met))
    assert sorted(met) == list(range(3 * AT_A_TIME))
    assert all(after - before <= AT_A_TIME for before, after in pairwise(counts))


def crowd(world: World, queue: DeadlineQueue, count: int, delay_s: float) -> list[float]:
    """Deadlines that are added together; returns the list to which each adds its time when it is met."""
    met: list[float] = []
    for number in range(count):
        queue.add(delay_s, lambda *_: met.append(world.loop.time()), SessionKey("o", "agent", "a"), number)
    return met


async def test_a_deadline_that_comes_alone_is_met_in_time(world: World) -> None:
    queue, start_s = DeadlineQueue(world.bridge.ctx), world.loop.time()
    met = crowd(world, queue, CROWD, 20.0)
    await world.pass_s(21)
    assert [at - start_s for at in met] == pytest.approx([20.0] * CROWD)


async def test_a_crowd_of_deadlines_is_spread_and_never_late(world: World) -> None:
    queue, start_s, count = DeadlineQueue(world.bridge.ctx), world.loop.time(), 2000
    met = crowd(world, queue, count, 20.0)
    await world.pass_s(21)
    after_s = [at - start_s for at in met]
    assert (len(met), max(after_s)) == (count, pytest.approx(20.0))
    assert min(after_s) >= 20.0 * (1.0 - EARLY) - 0.001
    assert max(Counter(int(at) for at in after_s).values()) < count / 2
    met = crowd(world, queue, CROWD, 20.0)
    await world.pass_s(21)
    assert [at - start_s - 21 for at in met] == pytest.approx([20.0] * CROWD), "those that are over do not count"


# --- work on all sessions ---------------------------------------------------------------------------------------------


async def test_work_on_all_sessions_lets_others_run_in_between(world: World) -> None:
    clock, timers = FakeClock(), FakeTimers()
    ctx = replace(world.bridge.ctx, clock=clock, timers=timers)
    done: list[int] = []

    def steps() -> Iterator[None]:
        for number in range(10):
            clock.now += 0.4 * SLICE_S
            done.append(number)
            yield

    in_slices(ctx, steps())
    turns = [len(done)]
    while timers.calls:
        [(delay_s, go_on)] = timers.calls
        assert delay_s == 0
        timers.calls.clear()
        go_on()
        turns.append(len(done))
    assert turns == [3, 6, 9, 10]


async def test_periodic_tasks_begin_again_only_after_their_last_step(world: World) -> None:
    clock, timers = FakeClock(), FakeTimers()
    ctx = replace(world.bridge.ctx, clock=clock, timers=timers)

    def slow() -> Iterator[None]:
        for _ in range(3):
            clock.now += 2 * TICK_S
            yield

    tasks = PeriodicTasks(ctx, ((TICK_S, slow),))
    tasks.start()
    delays_s = []
    for _ in range(5):
        [(delay_s, call)] = timers.calls
        delays_s.append(delay_s)
        timers.calls.clear()
        clock.now += delay_s
        call()
    assert delays_s == [TICK_S, 0, 0, 0, TICK_S]
