"""Links at run time: tokens, sharing, losses, watchdogs, idleness.

Rules: docs/reference/protocol.md#2-upstream-side-the-websocket, #21-link-life.
"""

from __future__ import annotations

import pytest

from shim.core.agent_calls import Accepted
from shim.core.link_state import LinkState
from shim.errors import ShimError
from shim.ports import DialFailure
from tests.bridge.conftest import MakeWorld, living
from tests.bridge.test_session_registry import status
from tests.support.upstream import REFUSED
from tests.support.world import World


def states(world: World) -> list[LinkState]:
    return [link.state for link in world.bridge.links]


# --- dialling ---------------------------------------------------------------------------------------------------------


async def test_a_configured_token_dials_at_once(world: World) -> None:
    [dial] = world.controller.dials
    assert dial.spec.url == "wss://api.vendor.test/api/v1/clusters/agent/ws"
    assert (dial.spec.token, dial.spec.in_header, dial.spec.in_query) == ("upstream-token", True, False)
    assert states(world) == [LinkState.ONLINE]


@pytest.mark.parametrize("auth, header, query", [("header", True, False), ("query", False, True), ("both", True, True)])
async def test_a_forced_way_of_authentication(make_world: MakeWorld, auth: str, header: bool, query: bool) -> None:
    world = await make_world(upstream={"auth": auth})
    [dial] = world.controller.dials
    assert (dial.spec.in_header, dial.spec.in_query) == (header, query)


async def test_auto_falls_back_to_the_query_and_remembers(make_world: MakeWorld) -> None:
    world = await make_world()
    world.controller.manners.refuse = lambda spec: None if spec.in_query else REFUSED
    world.controller.socket.lose()
    await world.pass_s(3)
    world.controller.socket.lose()
    await world.pass_s(3)
    assert [dial.spec.in_query for dial in world.controller.dials] == [False, False, True, True]


async def test_the_token_is_read_again_on_every_dial(world: World) -> None:
    world.token = "second"
    world.controller.socket.lose()
    await world.pass_s(3)
    assert world.controller.dials[-1].spec.token == "second"


async def test_a_changed_token_is_dialled_with_at_once(world: World) -> None:
    agent = await living(world)
    world.token = "second"
    first = world.controller.socket
    world.bridge.token_changed()
    await world.settle()
    assert first.closed_by_us == 1000
    assert world.controller.socket.spec.token == "second"
    assert [m.message.type for m in world.controller.log if m.socket is world.controller.socket] == [
        "register",
        "heartbeat",
    ]
    assert await agent.heartbeat() == Accepted()


async def test_a_revoked_token_is_replaced_without_waiting(world: World) -> None:
    world.controller.go_away(DialFailure("status", 401, 200.0))
    await world.pass_s(10)
    world.controller.come_back()
    world.bridge.token_changed()
    await world.settle()
    assert states(world) == [LinkState.ONLINE]


async def test_a_token_that_cannot_be_read_is_a_failed_dial(world: World) -> None:
    world.token_error = ShimError("unreadable")
    world.controller.socket.lose()
    await world.pass_s(10)
    assert len(world.controller.dials) == 1
    world.token_error = None
    await world.pass_s(6)
    assert states(world) == [LinkState.ONLINE]


async def test_a_socket_that_opens_too_late_is_closed(world: World) -> None:
    world.controller.manners.hangs = True
    world.controller.socket.lose()
    await world.pass_s(3)
    late = world.controller.dials[-1]
    world.controller.manners.hangs = False
    world.bridge.token_changed()
    await world.settle()
    socket = late.accept()
    await world.settle()
    assert socket.closed_by_us == 1000
    assert states(world) == [LinkState.ONLINE]


# --- one link or many -------------------------------------------------------------------------------------------------


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage_s", [2, 10, 60, 600])
async def test_back_within_ten_seconds_of_the_controllers_return(make_world: MakeWorld, outage_s: float) -> None:
    world = await make_world()
    agent = await living(world)
    world.controller.go_away()
    await agent.live(outage_s)
    world.controller.come_back()
    returned = world.now
    while states(world) != [LinkState.ONLINE]:
        await agent.live(1, every_s=1)
    assert world.now - returned <= 10


async def test_contention_is_said_once_and_paced(world: World, caplog: pytest.LogCaptureFixture) -> None:
    agent = await living(world)
    for _ in range(3):
        world.controller.socket.lose(by_close_frame=True, code=4000)
        await agent.live(6)
    assert [record.getMessage() for record in caplog.records].count("link_contended") == 1
    assert [link.machine.contended for link in world.bridge.links] == [True]
    dials = len(world.controller.dials)
    await agent.live(45)
    assert len(world.controller.dials) == dials
    await agent.live(60)
    assert len(world.controller.dials) == dials + 1
    assert [link.machine.contended for link in world.bridge.links] == [False]


async def test_a_rolling_update_of_the_controller_is_no_contention(world: World) -> None:
    agent = await living(world)
    for _ in range(5):
        lost_at = world.now
        world.controller.socket.lose(by_close_frame=True, code=1001)
        dials = len(world.controller.dials)
        await world.until(lambda known=dials: len(world.controller.dials) > known)  # type: ignore[misc]
        assert world.now - lost_at <= 5
        await agent.live(6)
    assert [link.machine.contended for link in world.bridge.links] == [False]


async def test_a_close_frame_may_refuse_the_token(world: World, caplog: pytest.LogCaptureFixture) -> None:
    agent = await living(world)
    world.controller.manners.closes = (4401, f"invalid token {world.settings.upstream.token}"[:123])
    world.controller.socket.lose(by_close_frame=True, code=4401, reason="revoked")
    await agent.live(240)
    assert len(world.controller.dials) < 30, "a refusal is not dialled at the pace of a loss"
    assert status(await agent.heartbeat()) == 401
    link = next(iter(world.bridge.links))
    assert (link.last_failure, link.last_detail) == ("closed 4401", "invalid token ***")
    lines = [record.fields for record in caplog.records if record.getMessage() == "link_lost"]  # type: ignore[attr-defined]
    assert {line["detail"] for line in lines} == {"revoked", "invalid token ***"}
    world.controller.manners.closes = None
    await agent.live(90)
    assert status(await agent.heartbeat()) == 200
    assert (link.last_failure, link.last_detail) == ("", "")


async def test_an_own_token_that_is_refused_is_dialled_once_a_minute(make_world: MakeWorld) -> None:
    world = await make_world(upstream={"token": "", "auth": "header"})
    world.controller.manners.dial = REFUSED
    agent = world.agent(token="bad", cluster_id="c-1")
    await agent.live(600)
    assert 9 <= len(world.controller.dials) <= 11
    await world.pass_s(200)
    dials = len(world.controller.dials)
    await world.pass_s(1000)
    assert len(world.controller.dials) == dials, "when its agent stops calling it is dropped"


@pytest.mark.parametrize("token, whose", [("", "the agent's own token"), ("upstream-token", "upstream.token")])
async def test_a_refusal_says_whose_token_it_is(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture, token: str, whose: str
) -> None:
    world = await make_world(upstream={"token": token, "auth": "header"})
    if token:
        world.controller.socket.lose()
    world.controller.manners.dial = REFUSED
    await world.agent(token="bad", cluster_id="c-1").live(10)
    said = {r.getMessage(): r.fields for r in caplog.records}  # type: ignore[attr-defined]
    assert said["token_refused"]["hint"] == f"check {whose} and its permissions"
    assert said["token_refused"]["link"] == said["dial_failed"]["link"], "so that one finds all lines of a link"


# --- idleness ---------------------------------------------------------------------------------------------------------
