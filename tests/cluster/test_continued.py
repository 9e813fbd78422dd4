"""A coroutine that goes on with another one's result, or closes it."""

from __future__ import annotations

import asyncio
import gc
from inspect import getcoroutinestate

import pytest

from shim.cluster.router import Continued


async def number(told: list[str]) -> int:
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        told.append("cancelled")
        raise
    return 20


async def test_the_result_is_finished() -> None:
    assert await Continued(number([]), lambda found: found + 1) == 21


async def test_it_can_be_a_task_and_is_cancelled_whole() -> None:
    told: list[str] = []
    task = asyncio.get_running_loop().create_task(Continued(number(told), str))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == ["cancelled"]


async def test_what_fails_before_the_end_fails_the_whole() -> None:
    with pytest.raises(ZeroDivisionError):
        await Continued(number([]), lambda found: found / 0)


def test_closed_before_it_starts_it_leaves_nothing_open() -> None:
    first = number([])
    Continued(first, str).close()
    gc.collect()  # a warning of a coroutine that was never awaited would fail the test
    assert getcoroutinestate(first) == "CORO_CLOSED"
