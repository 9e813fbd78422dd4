"""Timers: late ones, closed groups, deadlines behind one timer, and periodic tasks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from shim.bridge.context import DEFAULT_OWNER
from shim.bridge.scheduler import AT_A_TIME, CATCH_UP_S, LATE_S, TICK_S, DeadlineQueue, PeriodicTasks, TimerGroup
from shim.core.records import SessionKey
from shim.ports import Timer
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


class FakeClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return self.now


class FakeTimers:
    """Timers that the test fires."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        self.calls.append((delay, callback))
        return self

    def cancel(self) -> None:
        self.calls.clear()


async def test_a_late_timer_waits_once_for_input_that_arrived_meanwhile() -> None:
    clock, timers, fired = FakeClock(), FakeTimers(), []
    TimerGroup(timers, clock).call_later(5, lambda: fired.append(clock.now))
    clock.now = 5 + 2 * LATE_S  # the process was frozen
    timers.calls.pop()[1]()
    [(delay_s, fire)] = timers.calls
    assert (fired, delay_s) == ([], CATCH_UP_S)
    clock.now += 3 * LATE_S
    fire()
    assert fired == [clock.now], "it waits only once"


async def test_a_closed_group_fires_nothing_and_takes_nothing() -> None:
    timers, fired = FakeTimers(), []
    group = TimerGroup(timers, FakeClock())
    group.call_later(5, lambda: fired.append("before"))
    group.close()
    group.call_later(5, lambda: fired.append("after")).cancel()
    assert (timers.calls, group.pending, fired) == ([], set(), [])


# --- deadlines --------------------------------------------------------------------------------------------------------


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
    met: list[int] = []
    queue = DeadlineQueue(world.bridge.ctx)
    for number in range(3 * AT_A_TIME):
        queue.add(1.0, lambda _, item: met.append(item), SessionKey("o", "agent", "a"), number)
    counts: list[int] = []

    def count() -> None:
        counts.append(len(met))
        if len(met) < 3 * AT_A_TIME:
            world.loop.call_soon(count)

    world.loop.call_later(1.0, count)
    await world.pass_s(2)
    assert met == list(range(3 * AT_A_TIME))
    assert all(after - before <= AT_A_TIME for before, after in pairwise(counts))
