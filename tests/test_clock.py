"""shim.clock reads the machine's clocks."""

import sys
import time
from types import FrameType
from typing import Any

from shim.clock import Clock, pause


def test_reads_the_right_clocks() -> None:
    clock = Clock()
    before = time.time(), time.monotonic()
    read = clock.wall_s(), clock.monotonic_s()
    after = time.time(), time.monotonic()
    assert before[0] <= read[0] <= after[0]
    assert before[1] <= read[1] <= after[1]


def test_the_next_tick_is_a_multiple_of_the_interval_and_at_least_half_of_it_away() -> None:
    clock = Clock()
    began = time.monotonic()
    for every_s in (5.0, 0.02):
        until_s = time.monotonic() + 0.1  # five times the shorter interval: the question comes at all of its moments
        while time.monotonic() < until_s:
            before = time.monotonic()
            left_s = clock.until_tick_s(every_s)
            off_s = (before + left_s - began + every_s / 2) % every_s - every_s / 2
            assert abs(off_s) <= time.monotonic() - before + 3e-3, "the moment is the same whenever it is asked for"
            assert every_s / 2 <= left_s <= 1.5 * every_s


def test_a_tick_is_the_same_millisecond_whenever_it_is_asked_for() -> None:
    """The event loop's timers count milliseconds: work that is due in two of them wakes an idle shim twice."""
    clock, dues = Clock(), set()
    until_s = time.monotonic() + 0.2
    while time.monotonic() < until_s:
        before_ms = int(time.monotonic() * 1000)
        left_s = clock.until_tick_s(5)
        if int(time.monotonic() * 1000) == before_ms:  # else a millisecond ended between the two readings
            dues.add((before_ms + round(left_s * 1000)) % 5000)
    assert len(dues) == 1


def test_an_interrupt_ends_a_pause_at_any_moment() -> None:
    before, moments = sys.gettrace(), range(1, 200)
    for moment in moments:
        seen = 0

        def interrupt(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == moment:  # noqa: B023 - called within this turn only
                raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            pause(0.001)
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(before)
        break
    assert 1 < moment < moments.stop - 1, "every line of the pause was interrupted once"
