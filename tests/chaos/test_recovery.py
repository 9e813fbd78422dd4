"""How soon the shim is back after the controller was away, and how soon it finds out.

Rules: docs/reference/protocol.md#21-link-life.

Back within 10 s of the controller's return, measured from the moment it can be reached; half-open found in under 60 s,
a stalled application behind a live proxy in under 90 s.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.chaos.harness.outages import half_open_s, online, play, returns_s, stalled_s
from tests.chaos.harness.report import percentile
from tests.support.world import World


@pytest.mark.timeout(400)
def test_back_within_10_s_of_the_controllers_return_at_the_999th_of_1000() -> None:
    took_s = returns_s(1000)
    assert len(took_s) == 1000
    assert percentile(took_s, 0.999) < 10
    assert percentile(took_s, 0.5) < 4


def test_half_open_is_found_in_under_60_s() -> None:
    found_s = half_open_s(100)
    assert max(found_s) < 60
    assert min(found_s) > 25  # never condemned before it was asked


def test_a_stalled_application_behind_a_live_proxy_is_found_in_under_90_s() -> None:
    found_s = stalled_s(100)
    assert max(found_s) < 90
    assert min(found_s) > 27.5


def test_a_controller_that_acknowledges_no_longer_is_taken_for_stalled_once_and_not_for_ever() -> None:
    async def silence(world: World, rng: random.Random) -> None:
        world.controller.manners.acks = False
        world.controller.socket.lose()
        await world.settle()
        await world.until(lambda: online(world))
        dials = len(world.controller.dials)
        await asyncio.sleep(1800)
        assert len(world.controller.dials) == dials + 1

    play(silence, seed=4)
