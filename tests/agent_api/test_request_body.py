"""Long work on the event loop; how bodies are read is tried on the server's port (test_server.py)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from shim.agent_api.request_body import LongWork
from shim.core.bounds import LONG_TEXT_BYTES

HOLD_S = 0.03


async def piece(work: LongWork, size_bytes: int, loop_time: Callable[[], float]) -> tuple[float, float]:
    """Hold the event loop, and return when that began and ended."""
    async with work.turn(size_bytes):
        began_s = loop_time()
        while loop_time() < began_s + HOLD_S:
            pass
        return began_s, loop_time()


async def test_between_long_pieces_as_much_time_is_left_as_they_took() -> None:
    work, loop_time = LongWork(), asyncio.get_running_loop().time
    spans = await asyncio.gather(*(piece(work, LONG_TEXT_BYTES + 1, loop_time) for _ in range(3)))
    for (began_s, ended_s), (next_s, _) in itertools.pairwise(spans):
        assert next_s - ended_s >= 0.9 * (ended_s - began_s)


async def test_a_piece_that_fails_or_is_given_up_gives_its_turn_to_the_next() -> None:
    work, loop_time = LongWork(), asyncio.get_running_loop().time
    with pytest.raises(ValueError, match="malformed"):
        async with work.turn(LONG_TEXT_BYTES + 1):
            raise ValueError("malformed")
    async with work.turn(LONG_TEXT_BYTES + 1):
        waiting = asyncio.create_task(piece(work, LONG_TEXT_BYTES + 1, loop_time))
        await asyncio.sleep(0)
        waiting.cancel()
    assert await piece(work, LONG_TEXT_BYTES + 1, loop_time)


async def test_short_work_waits_for_nothing() -> None:
    work, passed = LongWork(), []
    async with work.turn(LONG_TEXT_BYTES + 1), work.turn(LONG_TEXT_BYTES):
        passed.append("short")
    assert passed == ["short"]
