"""The bridge's timers: late ones, freed ones, and their end."""

from __future__ import annotations

import gc

from shim.bridge.context import CATCH_UP_S, LATE_S, TimerGroup
from tests.support.virtual import FakeClock, FakeTimers


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


async def test_a_timer_that_has_fired_is_freed_without_the_garbage_collector() -> None:
    """The loop's timer refers to the group's, which must not refer back: polls arm thousands of them."""
    timers, clock = FakeTimers(), FakeClock()
    pending = TimerGroup(timers, clock).call_later(5, lambda: None)
    clock.now = 5.0
    timers.calls.pop()[1]()
    assert timers not in gc.get_referents(pending)
    pending = TimerGroup(timers, clock).call_later(5, lambda: None)
    pending.cancel()
    assert timers not in gc.get_referents(pending)


async def test_a_closed_group_fires_nothing_and_takes_nothing() -> None:
    timers, fired = FakeTimers(), []
    group = TimerGroup(timers, FakeClock())
    group.call_later(5, lambda: fired.append("before"))
    group.close()
    group.call_later(5, lambda: fired.append("after")).cancel()
    assert (timers.calls, group.pending, fired) == ([], set(), [])


# --- deadlines --------------------------------------------------------------------------------------------------------
