"""Every fault, as an agent sees it on the wire."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
import websockets
from hypothesis import given
from hypothesis import strategies as st

from devtools.controller import faults as fault
from devtools.controller.active_faults import ActiveFaults, Scope, parse_fault
from devtools.controller.commands import CommandSpec, parse_spec
from devtools.controller.faults import AnyFault, Endpoint, How
from devtools.controller.history import Event, EventKind
from devtools.controller.outbox import GARBAGE
from devtools.controller.server import DevController
from shim.errors import OperatorError
from tests.support.wsagent import TOKEN, WsAgent, connected, registered


def _spec(**fields: Any) -> CommandSpec:
    return parse_spec(fields)


def _closed(event: Event) -> bool:
    return event.kind is EventKind.CLOSED


async def _expect_nothing_more(agent: WsAgent) -> None:
    """Nothing else was sent before the answer to this."""
    assert (await agent.ask("ping", request_id="nothing-more"))["request_id"] == "nothing-more"


async def _refused(controller: DevController) -> websockets.Response:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with connected(controller):
            pass
    return refused.value.response


# --- the handshake ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_fault, retry_after",
    [
        (fault.Refuse(status=401), None),
        (fault.Refuse(status=403), None),
        (fault.Refuse(status=404), None),
        (fault.Refuse(status=429, retry_after_s=7), "7"),
        (fault.Refuse(status=503), None),
        (fault.Refuse(status=503, retry_after_s=1), "1"),
    ],
)
async def test_refuse(controller: DevController, given_fault: fault.Refuse, retry_after: str | None) -> None:
    fault_id = controller.set_fault(given_fault)
    for _ in range(2):
        response = await _refused(controller)
        assert response.status_code == given_fault.status
        assert response.headers.get("Retry-After") == retry_after
        assert json.loads(response.body)["success"] is False
    controller.state.faults.clear(fault_id)
    async with registered(controller):
        pass


async def test_refuse_with_a_redirect_and_words_of_its_own(controller: DevController) -> None:
    controller.set_fault(fault.Refuse(status=302, headers={"Location": "/elsewhere"}, error="moved", count=1))
    with pytest.raises((websockets.InvalidStatus, websockets.InvalidHandshake, ConnectionError)):
        async with connected(controller):
            pass
    refused = await controller.wait_for(lambda event: event.kind is EventKind.REFUSED)
    assert (refused.detail["status"], refused.detail["reason"]) == (302, "moved")


async def test_hang_handshake(controller: DevController) -> None:
    controller.set_fault(fault.HangHandshake())
    with pytest.raises(TimeoutError):
        async with connected(controller, open_timeout=0.2):
            pass
    hanging = asyncio.create_task(websockets.connect(f"{controller.ws_url}?token={TOKEN}").__aenter__())
    controller.clear_faults()
    ws = await hanging
    await WsAgent(ws).register()
    await ws.close()


@pytest.mark.parametrize("how", How)
async def test_accept_then_close(controller: DevController, how: How) -> None:
    controller.set_fault(fault.AcceptThenClose(how=how, code=1013, count=1))
    try:
        async with connected(controller) as agent:
            end = await agent.end()
    except (ConnectionError, websockets.InvalidHandshake):  # RST may destroy the handshake's answer
        assert how is How.RST
        end = None
    assert (end.code if end else None) == (1013 if how is How.CLOSE else None)
    closed = await controller.wait_for(_closed)
    assert closed.detail == {"by": "controller", "how": how.value, "code": 1013 if how is How.CLOSE else 1006}
    async with registered(controller):
        pass


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", How)
async def test_drop_all(controller: DevController, how: How) -> None:
    async with registered(controller) as one, connected(controller, "tok-2") as two:
        fault_id = controller.set_fault(fault.Drop(how=how, code=1012, reason="restarting"))
        for agent in (one, two):
            end = await agent.end()
            assert (end and (end.code, end.reason)) == ((1012, "restarting") if how is How.CLOSE else None)
    assert not controller.state.faults.clear(fault_id), "it shows once"
    async with registered(controller):
        pass


@pytest.mark.parametrize("how, error", [(How.ABORT, asyncio.IncompleteReadError), (How.RST, ConnectionResetError)])
async def test_drop_is_fin_or_rst(controller: DevController, how: How, error: type[Exception]) -> None:
    reader, writer = await asyncio.open_connection(*controller.listen)
    writer.write(
        b"GET /api/v1/clusters/agent/ws?token=tok-1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    controller.drop(how)
    async with asyncio.timeout(60):
        with pytest.raises(error):
            await reader.readexactly(1)
    writer.close()


@pytest.mark.parametrize("discard", [False, True])
async def test_drop_when_a_message_arrives(controller: DevController, discard: bool) -> None:
    """The link dies right after a send: the controller has the message, or never saw it."""
    async with registered(controller) as agent:
        controller.set_fault(fault.Drop(how=How.RST, on="command_result", discard=discard, count=1))
        await agent.heartbeat()
        await agent.send("command_result", {"command_id": "c-1", "success": True})
        assert await agent.end() is None
    await controller.wait_for(_closed)
    command = controller.state.commands.get("c-1")
    assert (command is None) is discard
    kinds = {event.kind for event in controller.history.after(0) if event.type == "command_result"}
    assert kinds == {EventKind.DISCARDED if discard else EventKind.RECEIVED}


async def test_silent(controller: DevController) -> None:
    """No answer, no pong, the socket stays open; what was sent meanwhile is read when it is over."""
    async with registered(controller) as agent:
        controller.set_fault(fault.Silent())
        seen = controller.history.last_n
        await agent.send("heartbeat", {"cluster_id": agent.cluster_id}, request_id="during")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await (await agent.ws.ping())
        assert controller.history.last_n == seen, "nothing was read, nothing was sent"
        async with registered(controller, "agent-2", "other"):
            pass
        controller.clear_faults()
        assert (await agent.receive("heartbeat_ack"))["request_id"] == "during"
        await agent.ping()


async def test_silent_holds_back_what_is_pushed_and_ends_by_itself(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Silent(duration_s=0.3))
        (command,) = controller.connections.push(_spec(agent_id="agent-1"))
        assert not command[1].written.done()
        assert (await agent.receive("command"))["payload"]["command_id"] == command[0].id
        ended = await controller.wait_for(lambda event: event.kind is EventKind.FAULT_ENDED)
        assert command[0].sent[0].n > ended.n


async def test_silent_connection_can_still_be_dropped(controller: DevController) -> None:
    for how in How:
        async with connected(controller) as agent:
            controller.set_fault(fault.Silent())
            controller.drop(how)
            end = await agent.end()
            assert (end is not None) is (how is How.CLOSE)
        controller.clear_faults()


async def test_silent_also_for_new_connections(controller: DevController) -> None:
    controller.set_fault(fault.Silent(new_connections=True, endpoint=Endpoint.CONTROLLER))
    async with connected(controller) as agent:
        await agent.send("ping", request_id="p")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await agent.ws.recv()
        controller.clear_faults()
        assert (await agent.receive("pong"))["request_id"] == "p"


async def test_stalled(controller: DevController) -> None:
    """Pings are answered, nothing else; what arrives is lost, what is pushed waits."""
    async with registered(controller) as agent:
        controller.set_fault(fault.Stalled())
        await agent.send("heartbeat", {"cluster_id": agent.cluster_id})
        await agent.ws.send("garbage")
        await agent.ping()
        (command,) = controller.connections.push(_spec())
        await agent.ping()
        assert not command[1].written.done()
        async with registered(controller, "agent-2", "other"):
            pass
        controller.clear_faults()
        await agent.receive("command")
        await _expect_nothing_more(agent)
    lost = await controller.wait_for(lambda event: event.kind is EventKind.DISCARDED)
    assert lost.type == "heartbeat"
    assert controller.state.registry.presence(agent.cluster_id).heartbeats == 0


async def test_slow(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Slow(latency_s=0.1, bytes_per_s=1000))
        sent = controller.history.last_n
        start = asyncio.get_running_loop().time()
        await agent.send("ping", {"filler": "x" * 200})
        await agent.receive("pong")
        took = asyncio.get_running_loop().time() - start
    assert took >= 0.1 + 0.2 + 0.1
    assert [event.type for event in controller.history.after(sent)][:2] == ["ping", "pong"]


# --- messages to the agent --------------------------------------------------------------------------------------------


async def test_delay(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Delay(delay_s=0.2, types=("heartbeat_ack",), count=1))
        start = asyncio.get_running_loop().time()
        await agent.send("heartbeat", request_id="late")
        await agent.send("ping")
        assert (await agent.receive())["type"] == "pong", "others overtake it"
        assert (await agent.receive())["request_id"] == "late"
        assert asyncio.get_running_loop().time() - start >= 0.2
        await agent.send("heartbeat", request_id="prompt")
        await agent.send("ping")
        assert (await agent.receive())["request_id"] == "prompt", "only one was to be late"
        assert (await agent.receive())["type"] == "pong"


async def test_late_answers_of_a_closed_connection_are_dropped(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Delay(delay_s=0.05))
        await agent.send("ping")
        await controller.received("ping")
    await controller.wait_for(_closed)
    async with registered(controller) as agent:
        await agent.ask("ping")
    assert [event.type for event in controller.history.after(0) if event.kind is EventKind.SENT].count("pong") == 1


async def test_duplicate(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Duplicate(times=3, count=1))
        for expected in (3, 1):
            (command,) = await controller.push_command(type="restart")
            frames = [await agent.receive("command") for _ in range(expected)]
            assert {frame["payload"]["command_id"] for frame in frames} == {command.id}
            assert len({json.dumps(frame) for frame in frames}) == 1
            await agent.heartbeat()
            assert len(command.sent) == expected


async def test_reorder(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Reorder(window=3, hold_s=60))
        (first,) = controller.connections.push(_spec())[0:1]
        await agent.heartbeat()
        more = controller.connections.push(_spec(count=2))
        expected = [more[1][0].id, more[0][0].id, first[0].id]
        assert [(await agent.receive("command"))["payload"]["command_id"] for _ in range(3)] == expected


async def test_reorder_does_not_wait_for_ever(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Reorder(window=3, hold_s=0.05))
        pushed = [command.id for command, _ in controller.connections.push(_spec(count=2))]
        assert [(await agent.receive("command"))["payload"]["command_id"] for _ in range(2)] == pushed[::-1]
        controller.clear_faults()
        controller.set_fault(fault.Reorder(window=3, hold_s=60))
        pushed = [command.id for command, _ in controller.connections.push(_spec(count=2))]
        await agent.heartbeat()
        controller.clear_faults()
        assert [(await agent.receive("command"))["payload"]["command_id"] for _ in range(2)] == pushed[::-1]
        controller.set_fault(fault.Reorder(window=3, hold_s=60))
        controller.connections.push(_spec())
        await agent.heartbeat()


async def test_garbage(controller: DevController) -> None:
    """Before each message one frame of the set; the WebSocket protocol itself is never broken."""
    async with registered(controller) as agent:
        controller.set_fault(fault.Garbage(count=len(GARBAGE)))
        got = []
        for _ in GARBAGE:
            await agent.send("ping")
            got.append(await agent.frame())
            await agent.receive("pong")
        assert got == list(GARBAGE)
        await _expect_nothing_more(agent)


async def test_oversize(controller: DevController) -> None:
    async with registered(controller, max_size=None) as agent:
        controller.set_fault(fault.Oversize(size_bytes=3_000_000, count=1))
        await agent.send("ping")
        big = await agent.receive("oversize")
        assert len(big["payload"]["filler"]) == 3_000_000
        await agent.receive("pong")
        await _expect_nothing_more(agent)


async def test_binary_frames(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.BinaryFrames(count=1))
        await agent.send("ping")
        frame = await agent.frame()
        assert isinstance(frame, bytes)
        assert json.loads(frame)["type"] == "pong"
        await agent.send("ping")
        assert isinstance(await agent.frame(), str)


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_register_in_progress(controller: DevController) -> None:
    async with connected(controller) as agent:
        controller.set_fault(fault.RegisterInProgress(times=2, interval_s=0.05, count=1))
        start = asyncio.get_running_loop().time()
        await agent.send("register", {"agent_id": "a", "name": "c"}, request_id="r-1")
        answers = [await agent.receive() for _ in range(3)]
        assert [a["type"] for a in answers] == ["register_in_progress"] * 2 + ["register_success"]
        assert {a["request_id"] for a in answers} == {"r-1"}
        assert asyncio.get_running_loop().time() - start >= 0.1
        await agent.register()


async def test_no_register_answer(controller: DevController) -> None:
    async with connected(controller) as agent:
        controller.set_fault(fault.NoRegisterAnswer(count=1))
        await agent.send("register", {"agent_id": "a", "name": "c"}, request_id="r-1")
        await _expect_nothing_more(agent)
        await agent.register()


async def test_register_error(controller: DevController) -> None:
    async with connected(controller) as agent:
        controller.set_fault(fault.RegisterError(agent_id="agent-1", count=1))
        conflict = fault.RegisterError(error="taken", code="conflict", extra={"cluster_id": "c-9"}, count=1)
        controller.set_fault(conflict)
        other = await agent.ask("register", {"agent_id": "agent-2", "name": "x"}, request_id="r-2")
        assert other["payload"] == {"error": "taken", "code": "conflict", "cluster_id": "c-9"}
        mine = await agent.ask("register", {"agent_id": "agent-1", "name": "x"}, request_id="r-3")
        assert (mine["type"], mine["request_id"]) == ("error", "r-3")
        assert mine["payload"] == {"error": "cluster name already exists"}
        await agent.register()


async def test_not_registered(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.NotRegistered(error="Cluster Not Registered, sorry", count=1))
        assert (await agent.heartbeat())["payload"] == {"error": "Cluster Not Registered, sorry"}
        assert (await agent.heartbeat())["type"] == "heartbeat_ack"


async def test_forget(controller: DevController) -> None:
    async with connected(controller) as agent:
        first = await agent.register("agent-1", "one")
        second = await agent.register("agent-2", "two")
        controller.set_fault(fault.Forget(agent_id="agent-1"))
        answer = await agent.ask("heartbeat", {"cluster_id": first["cluster_id"]})
        assert answer["payload"] == {"error": "cluster not found"}
        assert (await agent.ask("heartbeat", {"cluster_id": second["cluster_id"]}))["type"] == "heartbeat_ack"
        controller.set_fault(fault.Forget())
        assert (await agent.ask("heartbeat", {}))["payload"] == {"error": "cluster not registered"}
        again = await agent.register("agent-1", "one")
        assert (again["status"], again["cluster_id"]) == ("registered", first["cluster_id"])
    assert controller.state.faults.all() == []


async def test_new_cluster_ids(controller: DevController) -> None:
    async with connected(controller) as agent:
        first = await agent.register()
        controller.set_fault(fault.NewClusterIds(count=2))
        second = await agent.register(cluster_id=first["cluster_id"])
        third = await agent.register()
        fourth = await agent.register()
    assert len({first["cluster_id"], second["cluster_id"], third["cluster_id"]}) == 3
    assert fourth["cluster_id"] == third["cluster_id"]


async def test_gateway_with_a_url_of_its_own(controller: DevController) -> None:
    async with connected(controller) as agent:
        controller.set_fault(fault.Gateway(url="wss://evil.example/ws"))
        assert (await agent.register())["gateway_ws_url"] == "wss://evil.example/ws"


async def test_gateway_can_be_refused_alone(controller: DevController) -> None:
    controller.set_fault(fault.Refuse(status=503, endpoint=Endpoint.GATEWAY))
    async with registered(controller) as agent:
        pass
    url = f"ws://127.0.0.1:{controller.port}/gateway/ws?cluster_uuid={agent.cluster_id}"
    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"})
    assert refused.value.response.status_code == 503


@pytest.mark.parametrize("how", How)
async def test_close_after_register(controller: DevController, how: How) -> None:
    controller.set_fault(fault.CloseAfterRegister(how=how, code=1008, count=1))
    async with connected(controller) as agent:
        await agent.send("register", {"agent_id": "a", "name": "c"}, request_id="r-1")
        if how is not How.RST:  # which may overtake the answer
            await agent.receive("register_success")
        end = await agent.end()
        assert (end.code if end else None) == (1008 if how is How.CLOSE else None)
    sent = [event.type for event in controller.history.after(0) if event.kind is EventKind.SENT]
    assert sent == ["register_success"]


async def test_close_after_a_late_register_success(controller: DevController) -> None:
    controller.set_fault(fault.CloseAfterRegister(code=1008, count=1))
    controller.set_fault(fault.RegisterInProgress(interval_s=0.02, count=1))
    controller.set_fault(fault.Delay(delay_s=0.05, types=("register_success",), count=1))
    async with connected(controller) as agent:
        await agent.send("register", {"agent_id": "a", "name": "c"}, request_id="r-1")
        await agent.receive("register_in_progress")
        await agent.receive("register_success")
        assert (await agent.end()).code == 1008


async def test_no_heartbeat_acks(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.NoHeartbeatAcks(count=2))
        await agent.send("heartbeat")
        await agent.send("heartbeat")
        await _expect_nothing_more(agent)
        assert (await agent.heartbeat())["type"] == "heartbeat_ack"
    assert controller.state.registry.presence(agent.cluster_id).heartbeats == 3


# --- setting faults ---------------------------------------------------------------------------------------------------


async def test_faults_are_combined(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.Duplicate(types=()))
        controller.set_fault(fault.BinaryFrames())
        controller.set_fault(fault.Garbage(count=1))
        await agent.send("ping")
        frames = [await agent.frame() for _ in range(3)]
        assert frames[0] == GARBAGE[0]
        assert frames[1] == frames[2]
        assert isinstance(frames[1], bytes)


async def test_fault_starts_later_and_ends_by_itself(controller: DevController) -> None:
    async with registered(controller) as agent:
        controller.set_fault(fault.NoHeartbeatAcks(after_s=0.1, duration_s=0.2))
        await agent.heartbeat()
        started = await controller.wait_for(lambda event: event.kind is EventKind.FAULT_SET)
        await agent.send("heartbeat")
        await _expect_nothing_more(agent)
        ended = await controller.wait_for(lambda event: event.kind is EventKind.FAULT_ENDED)
        assert ended.monotonic_s - started.monotonic_s >= 0.15
        await agent.heartbeat()


async def test_fault_that_has_not_started_can_be_cleared(controller: DevController) -> None:
    fault_id = controller.set_fault(fault.Drop(after_s=0.05))
    assert controller.state.faults.clear(fault_id)
    async with registered(controller) as agent:
        controller.set_fault(fault.Delay(delay_s=0.1, types=("pong",)))
        assert (await agent.ask("ping"))["type"] == "pong"


async def test_fault_for_one_connection(controller: DevController) -> None:
    async with registered(controller) as one, registered(controller, "agent-2", "two") as two:
        controller.set_fault(fault.NoHeartbeatAcks(agent_id="agent-2"))
        controller.set_fault(fault.Drop(connection=1))
        assert (await one.end()).code == 1001
        await two.send("heartbeat")
        await _expect_nothing_more(two)


@pytest.mark.parametrize(
    "value, text",
    [
        ({}, "kind"),
        ([], "Expected `object`"),
        ({"kind": "nothing"}, "nothing"),
        ({"kind": "refuse", "status": 200}, ">= 300"),
        ({"kind": "refuse", "stats": 503}, "unknown field `stats`"),
        ({"kind": "drop", "how": "softly"}, "softly"),
        ({"kind": "delay"}, "delay_s"),
        ({"kind": "garbage", "count": 0}, ">= 1"),
        ({"kind": "silent", "count": 2}, "count has no meaning for silent"),
        ({"kind": "slow", "latency_s": -1}, ">= 0"),
    ],
)
def test_bad_fault_is_told(value: Any, text: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(text)) as refused:
        parse_fault(value)
    assert refused.value.status == 400


_COUNTED = [kind for kind in AnyFault.__args__ if kind.counted]


@given(st.sampled_from(_COUNTED), st.integers(1, 5), st.integers(1, 8))
def test_count_is_kept(kind: type[fault.Fault], count: int, takes: int) -> None:
    """However often a fault is asked for, it shows as often as it was told to."""
    book = ActiveFaults()
    more = {"delay_s": 1.0} if kind is fault.Delay else {}
    book.add(kind(count=count, **more))
    scope = Scope(Endpoint.CONTROLLER, 0, (), "command")
    assert sum(book.take(kind, scope) is not None for _ in range(takes)) == min(count, takes)
    assert bool(book.all()) is (takes < count)
