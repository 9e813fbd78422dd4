"""The control API over HTTP, as demos, the fault harness and users call it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from devtools.controller.history import EventKind
from devtools.controller.server import DevController
from devtools.controller.state import Options
from tests.support.wsagent import TOKEN, connected, registered


class Api:
    """Calls that expect success, unless `status` says otherwise."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session = session
        self._base = base

    async def call(self, method: str, path: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        async with self._session.request(method, self._base + path, data=data, **options) as response:
            answer = await response.json()
            assert response.status == status, answer
            assert answer["success"] is (status < 400)
            return answer

    async def get(self, path: str, **options: Any) -> Any:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        return await self.call("POST", path, body, **options)


@pytest.fixture
async def api(controller: DevController) -> AsyncIterator[Api]:
    async with _api(controller) as api:
        yield api


@asynccontextmanager
async def _api(controller: DevController) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession() as session:
        yield Api(session, controller.control_url)


# --- commands ---------------------------------------------------------------------------------------------------------


async def test_command_to_result(controller: DevController, api: Api) -> None:
    async with registered(controller) as agent:
        pushed = await api.post("/control/commands", {"agent_id": "agent-1", "type": "restart", "payload": {"x": 1}})
        (command_id,) = pushed["ids"]
        assert pushed["commands"][0]["sent"] is True
        assert pushed["commands"][0]["connection"] == 1
        message = await agent.receive("command")
        assert message["payload"] == {
            "command_id": command_id,
            "type": "restart",
            "payload": {"x": 1},
            "agent_id": "agent-1",
        }
        assert message["request_id"] == pushed["commands"][0]["request_id"]
        assert message["timestamp"]

        waiting = asyncio.create_task(api.get(f"/control/commands/{command_id}?wait=result&timeout_s=60"))
        await agent.send("command_ack", {"command_id": command_id})
        acked = await api.get(f"/control/commands/{command_id}?wait=ack&timeout_s=60")
        assert acked["waited_for"] is True
        assert acked["results"] == []
        assert not waiting.done()
        result = {"command_id": command_id, "success": True, "cluster_id": agent.cluster_id}
        await agent.send("command_result", result, request_id=message["request_id"])
        done = await waiting
    assert done["waited_for"] is True
    assert [ack["type"] for ack in done["acks"]] == ["command_ack"]
    assert [answer["payload"] for answer in done["results"]] == [result]
    assert done["sent"][0]["n"] < done["acks"][0]["n"] < done["results"][0]["n"]
    assert done["sent"][0]["monotonic_s"] <= done["results"][0]["monotonic_s"]
    assert done["sent"][0]["wall_s"] == pushed["commands"][0]["sent_wall_s"]


@pytest.mark.parametrize(
    "spec, payload, request_id",
    [
        ({"id_as": "id"}, {"id": "c-1", "type": "test", "payload": {}}, None),
        ({"id_as": "request_id"}, {"type": "test", "payload": {}}, "c-1"),
        ({"request_id": "R"}, {"command_id": "c-1", "type": "test", "payload": {}}, "R"),
        ({"request_id": ""}, {"command_id": "c-1", "type": "test", "payload": {}}, ""),
        ({"id_as": "none"}, {"type": "test", "payload": {}}, ""),
        ({"id_as": "none", "request_id": "R"}, {"type": "test", "payload": {}}, "R"),
        ({"id": 17}, {"command_id": 17, "type": "test", "payload": {}}, None),
        ({"type_as": "action", "payload_as": "args"}, {"command_id": "c-1", "action": "test", "args": {}}, None),
        ({"type_as": "command", "payload_as": "params", "payload": "x"},
         {"command_id": "c-1", "command": "test", "params": "x"}, None),
        ({"type_as": "none", "payload_as": "flat", "payload": {"a": 1}}, {"command_id": "c-1", "a": 1}, None),
        ({"ttl_seconds": 5, "expires_at": "2026-01-01T00:00:00Z", "created_at": None},
         {"command_id": "c-1", "type": "test", "payload": {}, "ttl_seconds": 5,
          "expires_at": "2026-01-01T00:00:00Z", "created_at": None}, None),
        ({"fields": {"payload": [1], "more": True}},
         {"command_id": "c-1", "type": "test", "payload": [1], "more": True}, None),
        ({"agent_id": "agent-1", "address": False}, {"command_id": "c-1", "type": "test", "payload": {}}, None),
    ],
)  # fmt: skip
async def test_envelope_variations(
    controller: DevController, api: Api, spec: dict[str, Any], payload: dict[str, Any], request_id: str | None
) -> None:
    async with registered(controller) as agent:
        await api.post("/control/commands", {"id": "c-1", **spec})
        message = await agent.receive("command")
    assert message["payload"] == payload
    if request_id is None:
        assert message["request_id"].startswith("req-")
    else:
        assert message.get("request_id", "") == request_id


async def test_count_and_message_type(controller: DevController, api: Api) -> None:
    async with registered(controller) as agent:
        pushed = await api.post("/control/commands", {"id": "batch", "count": 3, "message_type": "job"})
        assert pushed["ids"] == ["batch-1", "batch-2", "batch-3"]
        got = [(await agent.receive("job"))["payload"]["command_id"] for _ in range(3)]
        assert got == pushed["ids"]
        made_up = await api.post("/control/commands", {"count": 2})
        assert len(set(made_up["ids"])) == 2


async def test_right_connection(controller: DevController, api: Api) -> None:
    async with registered(controller, "agent-1", "one") as one, registered(controller, "agent-2", "two") as two:
        for target, expected in [
            ({"agent_id": "agent-1"}, one),
            ({"cluster_id": two.cluster_id}, two),
            ({"connection": 1}, one),
            ({}, two),
        ]:
            pushed = await api.post("/control/commands", target)
            assert (await expected.receive("command"))["payload"]["command_id"] == pushed["ids"][0]
        await one.heartbeat()
        async with connected(controller) as third:
            third.cluster_id = one.cluster_id
            await third.heartbeat()
            await api.post("/control/commands", {"cluster_id": one.cluster_id})
            await third.receive("command")
    for target in ({"agent_id": "agent-1"}, {"cluster_id": "nobody"}, {"agent_id": "nobody"}, {"connection": 9}, {}):
        await api.post("/control/commands", target, status=409)


async def test_result_by_request_id_and_result_of_an_unknown_command(controller: DevController, api: Api) -> None:
    async with registered(controller) as agent:
        pushed = await api.post("/control/commands", {"request_id": "R-1"})
        await agent.receive("command")
        await agent.send("command_result", {"success": False}, request_id="R-1")
        await api.get(f"/control/commands/{pushed['ids'][0]}?wait=result")
        await agent.send("command_result", {"command_id": "never-pushed", "code": "unknown_command"})
        unknown = await api.get("/control/commands/never-pushed?wait=result")
        assert unknown["pushed"] is False
        assert unknown["results"][0]["payload"]["code"] == "unknown_command"


async def test_same_id_again_is_the_same_command(controller: DevController, api: Api) -> None:
    async with registered(controller):
        for _ in range(2):
            await api.post("/control/commands", {"id": "twice"})
        assert len((await api.get("/control/commands/twice"))["sent"]) == 2


async def test_waiting_ends(controller: DevController, api: Api) -> None:
    async with registered(controller):
        pushed = await api.post("/control/commands")
        path = f"/control/commands/{pushed['ids'][0]}"
        assert (await api.get(path + "?wait=sent&timeout_s=0"))["waited_for"] is True
        assert (await api.get(path + "?wait=result&timeout_s=0.05"))["waited_for"] is False
    await api.get("/control/commands/nobody?wait=result&timeout_s=0.05", status=404)


async def test_what_a_fault_holds_back_is_not_told_as_sent(controller: DevController, api: Api) -> None:
    async with registered(controller):
        await api.post("/control/faults", {"kind": "stalled"})
        pushed = await api.post("/control/commands")
        assert pushed["commands"][0]["sent"] is False
        assert pushed["commands"][0]["sent_at"] is None
        assert (await api.get(f"/control/commands/{pushed['ids'][0]}"))["sent"] == []
    assert controller.state.commands.get(pushed["ids"][0]).sent == []


# --- the history ------------------------------------------------------------------------------------------------------


async def test_messages_are_filtered_and_paged(controller: DevController, api: Api) -> None:
    async with registered(controller) as agent:
        await agent.heartbeat(request_id="hb")
        await agent.ask("ping")
    await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
    everything = await api.get("/control/messages")
    assert [m["n"] for m in everything["messages"]] == list(range(1, everything["next"] + 1))
    kinds = [m["kind"] for m in everything["messages"]]
    assert kinds[:4] == ["started", "opened", "received", "sent"]
    assert kinds[-1] == "closed"

    beats = await api.get("/control/messages?type=heartbeat,heartbeat_ack")
    assert [(m["type"], m["direction"], m["request_id"]) for m in beats["messages"]] == [
        ("heartbeat", "in", "hb"),
        ("heartbeat_ack", "out", "hb"),
    ]
    sent = await api.get("/control/messages?direction=out&connection=1&kind=sent&limit=2")
    assert [m["type"] for m in sent["messages"]] == ["register_success", "heartbeat_ack"]
    rest = await api.get(f"/control/messages?direction=out&after={sent['next']}")
    assert [m["type"] for m in rest["messages"]] == ["pong"]
    assert (await api.get("/control/messages?connection=2"))["messages"] == []
    for message in everything["messages"]:
        assert message["monotonic_s"] > 0
        assert message["wall_s"] > 0
        assert message["time"].endswith("Z")


async def test_messages_can_be_waited_for(controller: DevController, api: Api) -> None:
    async with connected(controller) as agent:
        waiting = asyncio.create_task(api.get("/control/messages?type=ping&wait_s=10"))
        await agent.ask("pong_is_unknown")
        await agent.send("ping", request_id="here")
        found = await waiting
    assert [m["request_id"] for m in found["messages"]] == ["here"]
    none = await api.get(f"/control/messages?type=ping&after={found['next']}&wait_s=0.05")
    assert none["messages"] == []
    assert none["next"] >= found["next"]


async def test_agents(controller: DevController, api: Api) -> None:
    async with registered(controller, "agent-1", "one") as one:
        await one.heartbeat()
        async with registered(controller, "agent-2", "two") as two:
            seen = await api.get("/control/agents")
        await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
        later = await api.get("/control/agents")
    first, second = seen["agents"]
    assert (first["agent_id"], first["name"], first["cluster_id"]) == ("agent-1", "one", one.cluster_id)
    assert (first["connection"], first["registers"], first["heartbeats"]) == (1, 1, 1)
    assert first["last_heartbeat"]["status"] == "available"
    assert (second["connection"], second["last_heartbeat"]) == (2, None)
    assert [c["clusters"] for c in seen["connections"]] == [
        {one.cluster_id: "agent-1"},
        {two.cluster_id: "agent-2"},
    ]
    assert [agent["connection"] for agent in later["agents"]] == [1, None]
    assert TOKEN not in json.dumps(seen)


# --- send, drop, faults -----------------------------------------------------------------------------------------------


async def test_send_a_message(controller: DevController, api: Api) -> None:
    async with registered(controller) as agent:
        message = {"type": "tunnel_status", "request_id": "t", "payload": {"status": "REQUIRED"}}
        answer = await api.post("/control/send", {"agent_id": "agent-1", "message": message})
        assert answer["sent"] is True
        got = await agent.receive("tunnel_status")
        assert got | message == got
        assert got["timestamp"], "it was put in"


@pytest.mark.parametrize(
    "body, frame",
    [
        ({"text": "garbage"}, "garbage"),
        ({"text": "{}", "frame": "binary"}, b"{}"),
        ({"base64": base64.b64encode(b"\x00\xff").decode(), "frame": "binary"}, b"\x00\xff"),
    ],
)
async def test_send_a_raw_frame(controller: DevController, api: Api, body: Any, frame: str | bytes) -> None:
    async with registered(controller) as agent:
        await api.post("/control/send", body)
        assert await agent.frame() == frame
    raw = await controller.wait_for(lambda event: event.kind is EventKind.SENT_RAW)
    assert raw.detail["size_bytes"] == len(frame)


async def test_send_text_that_is_no_utf8_breaks_the_protocol(controller: DevController, api: Api) -> None:
    async with registered(controller) as agent:
        await api.post("/control/send", {"base64": base64.b64encode(b"\xff\xff").decode(), "frame": "text"})
        await agent.end()
    closed = await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
    assert closed.detail["code"] == 1007


async def test_drop(controller: DevController, api: Api) -> None:
    async with registered(controller) as one, registered(controller, "agent-2", "two") as two:
        assert (await api.post("/control/drop", {"agent_id": "agent-1", "code": 4000}))["dropped"] == [1]
        assert (await one.end()).code == 4000
        await two.heartbeat()
        assert (await api.post("/control/drop", {"how": "rst"}))["dropped"] == [2]
        assert await two.end() is None
    await controller.wait_for(lambda event: event.kind is EventKind.CLOSED and event.connection == 2)
    assert (await api.post("/control/drop"))["dropped"] == []


async def test_faults_over_http(controller: DevController, api: Api) -> None:
    script = [{"kind": "no_heartbeat_acks"}, {"kind": "drop", "after_s": 600}]
    ids = (await api.post("/control/faults", script))["ids"]
    (one,) = (await api.post("/control/faults", {"kind": "duplicate", "count": 5}))["ids"]
    listed = (await api.get("/control/faults"))["faults"]
    assert [(f["id"], f["kind"], f["started"], f["left"]) for f in listed] == [
        (ids[0], "no_heartbeat_acks", True, None),
        (ids[1], "drop", False, None),
        (one, "duplicate", True, 5),
    ]
    await api.call("DELETE", f"/control/faults/{one}")
    await api.call("DELETE", f"/control/faults/{one}", status=404)
    await api.call("DELETE", "/control/faults/x", status=404)
    assert (await api.call("DELETE", "/control/faults"))["cleared"] == 2
    assert (await api.get("/control/faults"))["faults"] == []


async def test_a_script_with_a_mistake_sets_nothing(api: Api) -> None:
    await api.post("/control/faults", [{"kind": "stalled"}, {"kind": "stalled", "count": 3}], status=400)
    assert (await api.get("/control/faults"))["faults"] == []


# --- bad requests, access ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, path, body, status, text",
    [
        ("POST", "/control/commands", b"{", 400, "the body must be JSON"),
        ("POST", "/control/commands", [1], 400, "Expected `object`"),
        ("POST", "/control/commands", {"kind": "x"}, 400, "unknown field `kind`"),
        ("POST", "/control/commands", {"count": 0}, 400, ">= 1"),
        ("POST", "/control/commands", {"payload_as": "flat", "payload": [1]}, 400, "a flat payload must be an object"),
        ("POST", "/control/send", {}, 400, "give one of message, text, base64"),
        ("POST", "/control/send", {"text": "", "base64": ""}, 400, "give one of message, text, base64"),
        ("POST", "/control/send", {"base64": "%%%"}, 400, "base64 is malformed"),
        ("POST", "/control/send", {"message": {"payload": {}}}, 400, "no such message"),
        ("POST", "/control/drop", {"code": 1}, 400, ">= 1000"),
        ("POST", "/control/drop", {"connection": 77}, 409, "no open connection speaks for this target"),
        ("POST", "/control/faults", {"kind": "x"}, 400, "no such fault"),
        ("GET", "/control/messages?after=x", None, 400, "after must be a number"),
        ("GET", "/control/messages?wait_s=-1", None, 400, "wait_s must be between 0 and 300 seconds"),
        ("GET", "/control/messages?wait_s=soon", None, 400, "wait_s must be between"),
        ("GET", "/control/messages?wait_s=nan", None, 400, "wait_s must be between"),
        ("GET", "/control/commands/x?wait=long", None, 400, "wait must be sent, ack or result"),
        ("GET", "/control/commands/x", None, 404, "no command with this id"),
        ("PUT", "/control/commands", None, 405, "Method Not Allowed"),
        ("GET", "/control/nothing", None, 404, "Not Found"),
    ],
)
async def test_bad_request_is_told(
    controller: DevController, api: Api, method: str, path: str, body: Any, status: int, text: str
) -> None:
    async with registered(controller):
        answer = await api.call(method, path, body, status=status)
    assert text in answer["error"]


async def test_overview_names_the_endpoints(api: Api) -> None:
    assert "POST /control/faults" in (await api.get("/control"))["endpoints"]


async def test_own_listener_and_token() -> None:
    options = Options(control=("127.0.0.1", 0), control_token="secret")
    async with DevController([TOKEN], options=options) as controller, _api(controller) as api:
        assert controller.control != controller.listen
        assert (await api.get("/control/agents", status=401))["error"].startswith("unauthorized")
        await api.get("/control/agents", status=401, headers={"Authorization": f"Bearer {TOKEN}"})
        await api.get("/control/agents", headers={"Authorization": "Bearer secret"})
        async with aiohttp.ClientSession() as session, session.get(controller.url + "/control/agents") as response:
            assert response.status == 404
