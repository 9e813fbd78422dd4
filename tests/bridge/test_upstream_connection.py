"""One upstream connection: liveness and frames that are no messages.

Rules: docs/reference/protocol.md#21-link-life.
"""

from __future__ import annotations

import pytest

from shim.core.link_state import LinkState
from tests.bridge.test_links import living, states
from tests.support.world import World


async def test_half_open_connections_are_found_in_under_a_minute(world: World) -> None:
    agent = await living(world)
    world.controller.manners.pongs = world.controller.manners.acks = False
    silent_since = world.now
    first = world.controller.socket
    while first.open:
        await agent.live(1, every_s=1)
    assert world.now - silent_since < 60
    assert first.closed_by_us == 0
    assert b"alive" in first.pings


async def test_a_stalled_application_behind_a_live_proxy_is_found_in_under_90_seconds(world: World) -> None:
    agent = await living(world)
    world.controller.manners.acks = False
    silent_since = world.now
    first = world.controller.socket
    while first.open:
        await agent.live(1, every_s=1)
    assert 55 < world.now - silent_since < 90


async def test_pings_of_the_controller_are_life(world: World) -> None:
    world.controller.manners.pongs = world.controller.manners.acks = False
    agent = await living(world)
    for _ in range(8):
        await agent.live(20)
        world.controller.socket.frame()
    assert len(world.controller.dials) == 1


async def test_bad_frames_are_said_once_per_kind_and_survived(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        world.controller.socket.bad_frame("not_json")
    world.controller.socket.bad_frame("no_type")
    await world.settle()
    ignored = [r.fields["kind"] for r in caplog.records if r.getMessage() == "frame_ignored"]  # type: ignore[attr-defined]
    assert ignored == ["not_json", "no_type"]
    assert world.metric("upstream_bad_frames_total", kind="not_json") == 3
    assert states(world) == [LinkState.ONLINE]
