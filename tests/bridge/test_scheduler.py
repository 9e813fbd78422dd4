"""Regular duties are done at their intervals, and one that fails keeps no other from its own."""

from __future__ import annotations

import pytest

from shim.bridge.scheduler import PeriodicTasks
from tests.support.world import World


async def test_a_duty_that_fails_is_said_and_counted_and_the_others_go_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    def fails() -> None:
        done.append("fails")
        raise ValueError("a defect")

    PeriodicTasks(world.bridge.ctx, ((1, fails), (5, lambda: done.append("rare")))).start()
    await world.pass_s(10.5)
    assert done.count("fails") == 10
    assert done.count("rare") == 2
    assert world.metric("internal_errors_total", part="bridge") == 10
    assert [record.getMessage() for record in caplog.records].count("upkeep_failed") == 10
