"""shim.clock reads the machine's clocks."""

import asyncio
import sys
import time
from types import FrameType
from typing import Any

import pytest

from shim.clock import Clock, pause

uvloop = pytest.importorskip("uvloop") if sys.platform == "linux" else None


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
        for _ in range(20):
            before = time.monotonic()
            left_s = clock.until_tick_s(every_s)
            off_s = (before + left_s - began + every_s / 2) % every_s - every_s / 2
            assert abs(off_s) <= time.monotonic() - before + 3e-3, "the moment is the same whenever it is asked for"
            assert every_s / 2 <= left_s <= 1.5 * every_s


@pytest.mark.skipif(sys.platform != "linux", reason="needs uvloop")
def test_what_is_due_at_a_tick_is_done_in_one_turn_of_the_loop() -> None:
    """An idle shim would wake up for each of them, and each time on a cold core."""
    every_s, ticks, turns = 0.05, 0, set()

    async def tick_together() -> None:
        clock, loop, over = Clock(), asyncio.get_running_loop(), asyncio.Event()
        turn = 0

        def next_turn() -> None:
            nonlocal turn
            turn += 1

        def tick(work_s: float) -> None:
            nonlocal ticks
            ticks += 1
            turns.add(turn)
            loop.call_soon(next_turn)
            pause(work_s)
            loop.call_later(clock.until_tick_s(every_s), tick, work_s)
            if ticks == 30:
                over.set()

        for work_s in (0.0, 0.0013, 0.0037):
            loop.call_later(clock.until_tick_s(every_s), tick, work_s)
        await over.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(tick_together(), 60))
    assert len(turns) <= 15, "ten, and a few where a millisecond ended between two readings of the time"


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
