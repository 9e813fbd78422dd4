"""The queue of events: they are handled in order, and never on the stack of their cause."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from shim.bridge.context import EventQueue
from tests.support.world import World


class Happened(NamedTuple):
    """An event of this test."""

    number: int


@pytest.fixture
def queue(world: World) -> EventQueue:
    return EventQueue(world.bridge.ctx.timers, world.bridge.ctx.metrics)


async def test_an_event_is_handled_after_its_cause_has_returned(world: World, queue: EventQueue) -> None:
    handled: list[int] = []
    queue.handlers = {Happened: lambda event: handled.append(event.number)}
    queue.put(Happened(1))
    queue.put(Happened(2))
    assert handled == []
    await world.settle()
    assert handled == [1, 2]


async def test_an_event_of_a_handler_comes_after_those_that_wait_already(world: World, queue: EventQueue) -> None:
    handled: list[int] = []

    def handle(event: Happened) -> None:
        if event.number == 1:
            queue.put(Happened(3))
        handled.append(event.number)

    queue.handlers = {Happened: handle}
    queue.put(Happened(1))
    queue.put(Happened(2))
    await world.settle()
    assert handled == [1, 2, 3]


async def test_a_handler_that_fails_is_counted_and_the_next_event_is_handled(
    world: World, queue: EventQueue, caplog: pytest.LogCaptureFixture
) -> None:
    world.has_defects = True
    handled: list[int] = []

    def handle(event: Happened) -> None:
        if event.number == 1:
            raise ValueError("a defect")
        handled.append(event.number)

    queue.handlers = {Happened: handle}
    queue.put(Happened(1))
    queue.put(Happened(2))
    await world.settle()
    assert handled == [2]
    assert world.metric("internal_errors_total", part="bridge") == 1
    assert "event_failed" in caplog.text
