"""Samples for the plots."""

from __future__ import annotations

import pytest

from shim.management.time_series import EVERY_S, KEPT, quantile
from tests.management.conftest import Page
from tests.support.world import World


async def test_samples_tell_what_waited_and_how_long_commands_took(page: Page, world: World) -> None:
    agent = world.agent()
    await agent.register()
    await agent.heartbeat()
    for command_id in ("k1", "k2"):
        world.controller.push(command_id, cluster_id=agent.cluster_id)
    await world.pass_s(EVERY_S)
    await agent.poll()
    await agent.result("k1")
    await world.pass_s(EVERY_S)
    columns = page.sampler.last()
    assert columns["waiting"][-2:] == [2, 0]
    assert columns["handed_over"][-2:] == [0, 2]
    assert columns["results"][-2:] == [0, 1]
    assert columns["p50_s"][-2] is None
    assert columns["p50_s"][-1] == pytest.approx(EVERY_S, abs=0.1)
    assert page.sampler.latency() == {
        "commands": 2,
        "p50_s": columns["p50_s"][-1],
        "p95_s": columns["p95_s"][-1],
    }


async def test_an_hour_is_kept(page: Page, world: World) -> None:
    await world.pass_s(3700)
    columns = page.sampler.last()
    assert {len(column) for column in columns.values()} == {KEPT}
    assert columns["at"][-1] - columns["at"][0] == pytest.approx(3600, abs=2 * EVERY_S)
    assert page.sampler.taken > KEPT
    assert [len(column) for column in page.sampler.last(3).values()] == [3] * len(columns)
    assert page.sampler.last(0)["at"] == []


async def test_replies_are_shown_per_second_with_the_errors_among_them(page: Page) -> None:
    requests = page.world.bridge.ctx.metrics.requests
    for status, number in ((204, 40), (404, 10)):
        for _ in range(number):
            requests.count(None, status, 0.0)
    await page.world.pass_s(EVERY_S)
    columns = page.sampler.last(1)
    assert (columns["calls_per_s"], columns["errors_per_s"]) == ([10.0], [2.0])
    await page.world.pass_s(EVERY_S)
    assert page.sampler.last(1)["calls_per_s"] == [0.0]


@pytest.mark.parametrize(
    "values, half, most",
    [([], None, None), ([3.0], 3.0, 3.0), ([2.0, 1.0], 1.0, 2.0), ([float(n) for n in range(1, 101)], 50.0, 95.0)],
)
def test_quantiles(values: list[float], half: float | None, most: float | None) -> None:
    assert (quantile(values, 0.5), quantile(values, 0.95)) == (half, most)
