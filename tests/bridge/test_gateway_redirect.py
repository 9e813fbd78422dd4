"""A cluster's traffic moves to the gateway that its registration names.

Rules: docs/reference/protocol.md#22-gateway-redirect.
"""

from __future__ import annotations

from typing import Any

import pytest

from shim.core.agent_calls import Registered
from shim.core.link_state import LinkState, PhaseKind
from shim.errors import ShimError
from shim.ports import DialRequest
from tests.bridge.conftest import MakeWorld
from tests.support.upstream import GONE, FakeSocket
from tests.support.world import Agent, World

GATEWAY = "wss://gw.vendor.test"


def to_gateway(spec: DialRequest) -> bool:
    return "gw." in spec.url


def sockets(world: World) -> tuple[list[FakeSocket], list[FakeSocket]]:
    """Those to the controller, and those to the gateway."""
    link = [socket for socket in world.controller.sockets if not to_gateway(socket.spec)]
    return link, [socket for socket in world.controller.sockets if to_gateway(socket.spec)]


def kinds(world: World, socket: FakeSocket) -> list[str]:
    return [sent.message.type for sent in world.controller.log if sent.socket is socket]


async def redirected(world: World, url: str = GATEWAY, **fields: str) -> Agent:
    world.controller.manners.success = {"gateway_ws_url": url}
    agent = world.agent(**fields)
    await agent.register()
    await world.settle()
    return agent


async def test_heartbeats_and_commands_flow_there_and_nothing_registers(world: World) -> None:
    agent = await redirected(world)
    [_], [gateway] = sockets(world)
    assert gateway.spec.url == "wss://gw.vendor.test/ws"
    assert gateway.spec.query == (("cluster_uuid", "uuid-c-1"),)
    assert (gateway.spec.token, gateway.spec.in_header, gateway.spec.in_query) == ("upstream-token", True, False)
    await agent.live(60)
    gateway.says("command", {"id": "k1"}, "r1")
    await world.settle()
    assert await agent.poll() == ["k1"]
    await agent.result("k1")
    await agent.live(40)
    assert set(kinds(world, gateway)) == {"heartbeat", "command_result"}
    assert "heartbeat" not in kinds(world, world.controller.sockets[0])
    assert await world.state("k1") == "closed"


async def test_a_gateway_that_opens_gets_the_waiting_results_and_the_newest_heartbeat_at_once(world: World) -> None:
    agent = await redirected(world)
    await agent.heartbeat()
    world.controller.push("k1")
    await world.settle()
    assert await agent.poll() == ["k1"]
    world.controller.manners.refuse = lambda spec: GONE
    for socket in list(world.controller.open_sockets()):
        socket.lose()
    await world.settle()
    await agent.result("k1")
    await agent.heartbeat("degraded")
    world.controller.manners.refuse = lambda spec: None
    await agent.live(20)
    gateways = [socket for socket in sockets(world)[1] if socket.open]
    assert len(gateways) == 1
    sent = [(each.message.type, each.at_s) for each in world.controller.log if each.socket is gateways[0]]
    assert sent[0][1] == sent[1][1]
    assert [kind for kind, _ in sent][:2] == ["command_result", "heartbeat"]


async def test_a_path_in_the_address_is_kept(world: World) -> None:
    await redirected(world, "https://gw.vendor.test:8443/tunnel?x=1")
    _, [gateway] = sockets(world)
    assert gateway.spec.url == "wss://gw.vendor.test:8443/tunnel?x=1"


@pytest.mark.parametrize(
    "url",
    [
        "wss://gw.evil.test",
        "wss://vendor.test.evil.test",
        "ws://gw.vendor.test",
        "wss://10.0.0.1",
        "wss://[::1",
        "wss://gw.vendor.test:99999",
        "ftp://gw.vendor.test",
        "https://",
        "gw.vendor.test",
    ],
)
async def test_tokens_go_to_no_other_host(make_world: MakeWorld, url: str) -> None:
    world = await make_world(upstream={"url": "https://api.vendor.test"})
    agent = await redirected(world, url)
    await agent.live(30)
    assert len(world.controller.dials) == 1
    assert world.metric("gateway_dials_total", outcome="host_refused") == 1
    assert world.controller.got("heartbeat"), "it stays on the controller"


@pytest.mark.parametrize(
    "host, goes",
    [("gw.other.test", True), ("GW.other.test.", True), ("a.b.cdn.test", True), ("gw.vendor.test", False)],
)
async def test_allowed_hosts_can_be_configured(make_world: MakeWorld, host: str, goes: bool) -> None:
    world = await make_world(upstream={"gateway_hosts": ["gw.Other.test.", "*.cdn.test"]})
    await redirected(world, f"wss://{host}")
    assert (len(world.controller.dials) == 2) is goes


@pytest.mark.parametrize(
    "base, url, goes",
    [
        ("https://api.pipeops.io", "wss://gw.eu.pipeops.io", True),
        ("https://api.pipeops.io", "wss://gw.pipeops.app", False),
        ("https://one.co.uk", "wss://two.co.uk", False),
        ("https://10.1.0.1", "wss://10.2.0.1", False),
        ("https://10.1.0.1", "wss://10.1.0.1", True),
        ("https://[fd00::1]", "wss://[fd00::2]", False),
        ("https://[fd00::1]", "wss://[fd00:0::1]", True),
        ("https://api.vendor.test.", "wss://gw.Vendor.test", True),
        ("http://127.0.0.1:9", "ws://127.0.0.1:10", True),
        ("https://localhost.", "ws://localhost.", False),
    ],
)
async def test_by_default_the_registrable_domain_decides(
    make_world: MakeWorld, base: str, url: str, goes: bool
) -> None:
    world = await make_world(upstream={"url": base})
    await redirected(world, url)
    assert (len(world.controller.dials) == 2) is goes


async def test_the_controller_may_close_the_link_and_is_left_alone(world: World) -> None:
    agent = await redirected(world)
    [link], _ = sockets(world)
    link.lose(by_close_frame=True, code=1000)
    await agent.live(300)
    controllers, gateways = sockets(world)
    assert (len(controllers), len(gateways)) == (1, 1)
    assert [link.state for link in world.bridge.links] == [LinkState.IDLE]
    assert not [link for link in world.bridge.links if link.machine.contended]


async def test_a_lost_link_that_no_session_needs_is_idle_from_its_next_dial_on(world: World) -> None:
    agent = await redirected(world)
    await agent.heartbeat()
    [socket], _ = sockets(world)
    socket.lose()
    lost_at = world.now
    await world.pass_s(10)
    [link] = world.bridge.links
    assert len(sockets(world)[0]) == 1
    *_, down, idle = link.history.last(world.now, 60)
    assert (down.phase, down.since_s, idle.phase) == (PhaseKind.DOWN, lost_at, PhaseKind.IDLE)
    assert lost_at < idle.since_s <= lost_at + 1


async def test_a_link_that_a_registration_waits_for_is_dialled_although_gateways_carry_everything(world: World) -> None:
    await redirected(world)
    [socket], _ = sockets(world)
    world.controller.manners.refuse = lambda spec: None if to_gateway(spec) else GONE
    socket.lose()
    waiting = world.loop.create_task(world.agent(name="other", agent_id="pod-2").register())
    await world.pass_s(1)
    assert not waiting.done()
    world.controller.manners.refuse = lambda spec: None
    await world.pass_s(9)
    assert isinstance(waiting.result(), Registered)


async def test_a_link_that_only_serves_gateways_is_closed_as_idle(world: World) -> None:
    agent = await redirected(world)
    await agent.live(200)
    [link], [gateway] = sockets(world)
    assert link.closed_by_us == 1000
    assert gateway.open


async def test_another_sessions_register_wakes_the_link(world: World) -> None:
    agent = await redirected(world)
    await agent.live(200)
    world.controller.manners.success = {}
    other = world.agent(name="other", agent_id="pod-2")
    await other.register()
    await other.heartbeat()
    await world.settle()
    controllers, gateways = sockets(world)
    assert kinds(world, controllers[-1]) == ["register", "heartbeat"], "the redirected one is not told there"
    assert len(gateways) == 1


async def test_a_lost_gateway_leads_back_to_the_controller_with_a_full_registration(world: World) -> None:
    agent = await redirected(world)
    await agent.live(200)
    _, [gateway] = sockets(world)
    world.controller.manners.refuse = lambda spec: GONE if to_gateway(spec) else None
    gateway.lose()
    await agent.live(10)
    controllers, _ = sockets(world)
    assert kinds(world, controllers[-1])[:2] == ["register", "heartbeat"]
    world.controller.manners.refuse = lambda spec: None
    await agent.live(70)
    _, gateways = sockets(world)
    assert gateways[-1].open
    assert gateways[-1] is not gateway


async def test_heartbeats_wait_for_the_registration_that_follows_a_lost_gateway(world: World) -> None:
    agent = await redirected(world)
    await agent.heartbeat()
    [link], [gateway] = sockets(world)
    world.controller.manners.refuse = lambda spec: GONE if to_gateway(spec) else None
    world.controller.manners.registers = False
    gateway.lose()
    await world.settle()
    await agent.heartbeat(status="degraded")  # a change is sent at once
    await world.settle()
    assert link.open
    assert set(kinds(world, link)) == {"register"}
    assert kinds(world, link).count("register") > 1
    world.controller.answer_register()
    await world.settle()
    assert kinds(world, link)[-1] == "heartbeat"


async def test_a_gateway_that_cannot_be_reached_costs_nothing(world: World) -> None:
    world.controller.manners.refuse = lambda spec: GONE if to_gateway(spec) else None
    agent = await redirected(world)
    await agent.live(60)
    [link], _ = sockets(world)
    assert kinds(world, link)[:2] == ["register", "heartbeat"]
    tries = [dial for dial in world.controller.dials if to_gateway(dial.spec)]
    assert 3 <= len(tries) <= 12, "with a growing pace"


async def test_unconfirmed_results_of_a_lost_gateway_go_up_by_the_link(world: World) -> None:
    agent = await redirected(world)
    _, [gateway] = sockets(world)
    gateway.says("command", {"id": "k1"}, "r1")
    await world.settle()
    await agent.poll()
    gateway.swallows = True
    await agent.result("k1")
    await world.settle()
    assert not world.controller.results("k1")
    world.controller.manners.refuse = lambda spec: GONE if to_gateway(spec) else None
    gateway.lose()
    await world.settle()
    assert len(world.controller.results("k1")) == 1


async def test_a_gateway_that_does_not_know_the_cluster_is_left(world: World) -> None:
    agent = await redirected(world)
    _, [gateway] = sockets(world)
    await agent.live(10)
    gateway.says("error", {"error": "cluster not registered"})
    await world.settle()
    assert gateway.closed_by_us == 1000
    controllers, gateways = sockets(world)
    assert kinds(world, controllers[-1])[-2:] == ["register", "heartbeat"]
    assert len(gateways) == 2, "the controller named it again"


async def test_another_address_is_followed(world: World) -> None:
    agent = await redirected(world)
    await redirected(world, "wss://gw.vendor.test/two")
    _, [first, second] = sockets(world)
    assert first.closed_by_us == 1000
    await agent.live(30)
    assert kinds(world, second)[0] == "heartbeat"


async def test_the_gateway_of_a_dead_agent_is_closed(world: World) -> None:
    agent = await redirected(world)
    await agent.heartbeat()
    await world.pass_s(60)
    _, [gateway] = sockets(world)
    assert gateway.closed_by_us == 1000
    await agent.heartbeat()
    await world.settle()
    _, gateways = sockets(world)
    assert len(gateways) == 2, "its next call leads through the controller"


async def test_a_half_open_gateway_is_found(world: World) -> None:
    agent = await redirected(world)
    world.controller.manners.pongs = world.controller.manners.acks = False
    _, [gateway] = sockets(world)
    await agent.live(70)
    assert gateway.closed_by_us == 0


async def test_a_new_token_reaches_gateways(world: World) -> None:
    agent = await redirected(world)
    _, [gateway] = sockets(world)
    world.token = "second"
    world.bridge.token_changed()
    await agent.live(5)
    _, gateways = sockets(world)
    assert gateway.closed_by_us == 1000
    assert gateways[-1].spec.token == "second"


async def test_a_token_that_cannot_be_read_is_a_failed_dial_of_the_gateway(world: World) -> None:
    world.token_error = ShimError("unreadable")
    agent = await redirected(world)
    assert not sockets(world)[1]
    world.token_error = None
    await agent.live(10)
    assert len(sockets(world)[1]) == 1


async def test_a_gateway_that_opens_too_late_is_closed(world: World) -> None:
    world.controller.manners.hangs = True
    agent = await redirected(world)
    late = world.controller.dials[-1]
    await redirected(world, "wss://gw.vendor.test/two")
    socket = late.accept()
    await agent.live(5)
    assert socket.closed_by_us == 1000


async def test_what_a_gateway_sends_is_rejected_there(world: World) -> None:
    await redirected(world)
    _, [gateway] = sockets(world)
    gateway.says("command", {"id": "a/b"}, "r1")
    gateway.says("command", {"id": "k2", "cluster_id": "c-unknown"}, "r2")
    await world.settle()
    answers: list[dict[str, Any]] = [s.message.payload for s in world.controller.log if s.socket is gateway]
    assert [answer["code"] for answer in answers] == ["malformed", "unknown_agent"]


async def test_status_reports_go_there_too(world: World) -> None:
    agent = await redirected(world, dialect="agents", agent_id="a-1")
    await agent.heartbeat()
    await agent.status(pods=1)
    await world.settle()
    _, [gateway] = sockets(world)
    assert kinds(world, gateway) == ["heartbeat", "status"]
