"""How often a snapshot is taken for the readers of `/events`."""

from __future__ import annotations

import json
from typing import Any

from shim.admin.event_stream import EVERY_S, MAX_EVERY_S, SHARE, EventStream
from tests.management.conftest import Page
from tests.support.virtual import FakeClock


class Scene:
    def __init__(self, page: Page) -> None:
        self.clock = FakeClock(100.0)
        self.took_s = 0.0
        self.taken = 0
        self.live = EventStream(self.clock, page.sampler, self._prepare, self._take)

    async def _prepare(self) -> list[str]:
        return ["a reason"]

    def _take(self, reasons: list[str]) -> dict[str, Any]:
        self.taken += 1
        self.clock.now += self.took_s
        return {"number": self.taken, "not_ready": reasons}

    async def number(self) -> int:
        """Of the snapshot that a reader gets now."""
        event, data = (await self.live.status()).decode().splitlines()[:2]
        assert event == "event: status"
        shown = json.loads(data.removeprefix("data: "))
        assert shown["not_ready"] == ["a reason"]
        return int(shown["number"])


async def test_readers_of_one_moment_share_a_snapshot(page: Page) -> None:
    scene = Scene(page)
    assert [await scene.number() for _ in range(16)] == [1] * 16
    scene.clock.now += EVERY_S
    assert [await scene.number() for _ in range(16)] == [2] * 16


async def test_a_snapshot_that_takes_long_is_taken_less_often(page: Page) -> None:
    scene = Scene(page)
    scene.took_s = 3 * EVERY_S * SHARE
    await scene.number()
    scene.clock.now += EVERY_S
    assert await scene.number() == 1
    scene.clock.now += 2 * EVERY_S
    assert await scene.number() == 2
    scene.took_s = 10.0
    scene.clock.now += MAX_EVERY_S
    await scene.number()
    scene.clock.now += MAX_EVERY_S
    assert await scene.number() == 4
