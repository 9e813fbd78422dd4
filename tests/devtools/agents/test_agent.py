"""Simulated agents against the vendor's recorded calls, and their behaviour over time against a recording server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from devtools.agents import (
    GENERATIONS,
    AgentProfile,
    Callbacks,
    CallOutcome,
    Command,
    Event,
    EventKind,
    Exchange,
    Identity,
    LegacyAgent,
    PollStyle,
    Response,
    Result,
    WireError,
)
from devtools.agents.replies import DecodeError, decode_commands, decode_tunnel
from shim.clock import Clock
from tests.support import generations
from tests.support.generations import Verdict
from tests.support.recording_server import Recorded, RecordingServer, http

FIXTURES = Path(__file__).parents[2] / "fixtures"
REAL = {generation.label: generation for generation in generations.GENERATIONS}
SOON_S = 0.005
REGISTERED = http(200, {"cluster_id": "c-1", "cluster": {"id": "c-1"}})
STAMP = re.compile(r"20\d\d-\d\d-\d\dT[\d:.]+Z")


class FixedClock(Clock):
    """A wall clock that stands, with all nine digits of its nanoseconds in use."""

    def wall_s(self) -> float:
        return 1795410494.712349144


@dataclass
class Harness:
    """An agent, the server it talks to, and all that happened to it."""

    agent: LegacyAgent
    server: RecordingServer
    events: list[Event]

    async def until(self, what: EventKind, outcome: CallOutcome = CallOutcome.OK, count: int = 1) -> list[Event]:
        """Wait until so many events of a kind have come, and return them."""
        await self.server.until(lambda: len(self.of(what, outcome)) >= count)
        return self.of(what, outcome)

    def of(self, what: EventKind, outcome: CallOutcome = CallOutcome.OK) -> list[Event]:
        return [event for event in self.events if (event.what, event.outcome) == (what, outcome)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            task = group.create_task(self.agent.run())
            yield
            task.cancel()


def who(agent_id: str = "agent-b", **rest: Any) -> Identity:
    return Identity(agent_id=agent_id, cluster_name="prod-cluster", token="tok", **rest)


@asynccontextmanager
async def harness(
    answer: Callable[[Recorded], bytes | Awaitable[bytes | None] | None],
    profile: AgentProfile | None = None,
    cluster_id: str = "",
    identity: Identity | None = None,
    **callbacks: Any,
) -> AsyncIterator[Harness]:
    events: list[Event] = []
    async with RecordingServer(answer) as server:

        def on_event(event: Event) -> None:
            events.append(event)
            server.wake()

        wiring = Callbacks(event=on_event, **callbacks)
        agent = LegacyAgent(server.url, identity or who(), profile or AgentProfile(), FixedClock(), wiring, cluster_id)
        try:
            yield Harness(agent, server, events)
        finally:
            agent.close()


def recorded(name: str, end: str) -> tuple[str, str, list[list[str]], str]:
    """The first recorded call with this path's end: method, path, headers, body with time stamps masked."""
    lines = map(json.loads, (FIXTURES / name).read_text().splitlines())
    call = next(call for call in lines if call["path"].endswith(end))
    return call["method"], call["path"], call["headers"], STAMP.sub("T", call["body"])


def sent(server: RecordingServer) -> tuple[str, str, list[list[str]], str]:
    """The latest call in the same form, its Host as in the recording."""
    call = server.calls[-1]
    assert call.headers[0] == ["Host", server.url.removeprefix("http://")]
    headers = [["Host", "127.0.0.1:7080"], *call.headers[1:]]
    return call.method, call.path, headers, STAMP.sub("T", call.body.decode())


async def test_b_calls_are_those_of_the_real_client_byte_for_byte() -> None:
    name = "legacy-clusters-agent-v1.jsonl"
    async with harness(lambda call: REGISTERED, identity=who(service_token="sa-token")) as it:
        await it.agent.register()
        assert sent(it.server) == recorded(name, "/register")
        await it.agent.heartbeat()
        assert sent(it.server) == recorded(name, "/heartbeat")
        await it.agent.poll_tunnel()
        assert sent(it.server) == recorded(name, "/tunnel/status")
        await it.agent.health()
        assert sent(it.server) == recorded(name, "/health")


async def test_a_calls_are_those_of_the_real_client_byte_for_byte() -> None:
    name = "legacy-agents-v1.jsonl"
    commands = {"commands": [{"id": "cmd-1", "type": "scale", "payload": {}, "created_at": "2025-10-08T00:00:00Z"}]}
    async with harness(
        lambda call: http(200, commands if call.path.endswith("/commands") else None),
        AgentProfile(dialect="agents"),
        identity=who("agent-a"),
    ) as it:
        await it.agent.status()
        assert sent(it.server) == recorded(name, "/status")
        await it.agent.poll()
        assert sent(it.server) == recorded(name, "/result")
        await it.agent.poll()
        assert it.server.calls[-2].headers[1:] == recorded(name, "/commands")[2][1:]


@pytest.mark.parametrize(
    "call, never_sent",
    [("register", {"token"}), ("heartbeat", set())],
    ids=["register", "heartbeat"],
)
async def test_a_bodies_have_the_keys_of_the_real_client_in_its_order(call: str, never_sent: set[str]) -> None:
    """The recordings come from the client's own example with other values; `token` no agent ever set."""
    async with harness(
        lambda call: http(204), AgentProfile(dialect="agents"), identity=who("agent-a", version="1.28.3")
    ) as it:
        await getattr(it.agent, call)()
        method, path, headers, body = sent(it.server)
        real = recorded("legacy-agents-v1.jsonl", f"/{call}")
        assert (method, path) == real[:2]
        assert [pair for pair in headers if pair[0] != "Content-Length"] == [
            pair for pair in real[2] if pair[0] != "Content-Length"
        ]
        assert [pair[0] for pair in headers] == [pair[0] for pair in real[2]]
        assert list(json.loads(body)) == [key for key in json.loads(real[3]) if key not in never_sent]


async def test_b3_names_its_agent_in_the_path_and_sends_the_token_it_was_given() -> None:
    reply = {"cluster": {"id": "c-3", "token": "from-register"}}
    async with harness(lambda call: http(200, reply), AgentProfile(dialect="clusters"), identity=who("agent-3")) as it:
        await it.agent.register()
        await it.agent.heartbeat()
        register, heartbeat = it.server.calls
        assert (register.path, heartbeat.path) == ("/clusters/agent-3", "/clusters/agent-3/heartbeat")
        assert "tunnel_config" in register.json
        assert "token" not in register.json
        assert (heartbeat.json["cluster_id"], heartbeat.json["token"]) == ("c-3", "from-register")


REPLIES: list[Any] = [
    {"success": True, "cluster_id": "c-1", "cluster": {"id": "c-1", "workspace_id": 12}},
    {"cluster_id": "c-1", "cluster": None, "data": None},
    {"cluster_id": 7, "cluster": {"id": "c-1"}},
    {"cluster": {"id": "c-1"}},
    {"cluster_id": "", "cluster": {"id": ""}},
    {"cluster_id": "c-1", "cluster": {"id": "c-1", "workspace_id": "12"}},
    {"cluster_id": "c-1", "cluster": {"id": "c-1", "workspace_id": 12.5}},
    {"cluster_id": "c-1", "cluster": {"id": "c-1", "registered_at": ""}},
    {"cluster_id": "c-1", "cluster": {"id": "c-1"}, "data": {"registered_at": "2026-01-01"}},
    {"cluster_id": "c-1", "cluster": {"id": "c-1"}, "data": {"registered_at": "2026-01-01T00:00:00.5+01:00"}},
    b"",
    b"null",
    b'{"cluster_id":"c-1"} x',
    b"[]",
]


@pytest.mark.parametrize("status", [200, 201, 202, 204, 401, 409, 500])
@pytest.mark.parametrize("reply", REPLIES, ids=[str(number) for number in range(len(REPLIES))])
@pytest.mark.parametrize("label", ["A1", "B3", "B7"])
async def test_register_replies_are_taken_as_the_generation_takes_them(label: str, reply: Any, status: int) -> None:
    generation = REAL[label]
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    async with harness(lambda call: http(status, body), AgentProfile(dialect=generation.dialect)) as it:
        success = await it.agent.register()
        read = generation.read("register", status, b"" if status == 204 else body)
        if label == "B3" and status in (200, 201) and read.value is None:
            # No agent exits here: it goes on with its own id, or with none at all.
            assert success
            assert it.agent.cluster_id == ("" if read.reason == "no cluster id" else "agent-b")
            return
        assert success == (read.verdict is Verdict.CONTENT)
        if success and label != "A1":
            assert it.agent.cluster_id == read.value
        wanted = CallOutcome.UNDECODABLE if status in (200, 201) else CallOutcome.REFUSED
        assert it.events[-1].outcome is (CallOutcome.OK if success else wanted)
        assert it.events[-1].status == status


COMMANDS: list[Any] = [
    {"commands": [{"id": "1", "type": "t", "payload": {"a": 1}, "created_at": "2025-10-08T00:00:00Z"}]},
    {"commands": None},
    {},
    {"commands": [{"id": 1, "type": "t"}]},
    {"commands": [{"id": "1", "type": "t", "payload": []}]},
    {"commands": [{"id": "1", "type": "t", "payload": {}, "created_at": "2025-10-08 00:00:00Z"}]},
    {"commands": {}},
    b"",
    b"{} {}",
    b"null",
]


@pytest.mark.parametrize("reply", COMMANDS, ids=[str(number) for number in range(len(COMMANDS))])
def test_drained_commands_decode_as_in_go(reply: Any) -> None:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    read = REAL["A1"].read("poll", 200, body)
    if read.verdict is Verdict.CONTENT:
        assert [command.id for command in decode_commands(body)] == [entry["id"] for entry in read.value or []]
    else:
        with pytest.raises(DecodeError):
            decode_commands(body)


@pytest.mark.parametrize(
    "reply", [{}, {"status": "IDLE", "poll_frequency": 5}, {"forwards": [{"name": "k", "remote_port": "1"}]}, []]
)
def test_tunnel_replies_decode_as_in_go(reply: Any) -> None:
    body = json.dumps(reply).encode()
    read = REAL["B7"].read("tunnel_poll", 200, body)
    if read.verdict is Verdict.CONTENT:
        assert decode_tunnel(body).status == reply.get("status")
    else:
        with pytest.raises(DecodeError):
            decode_tunnel(body)


async def test_b_registers_once_then_sends_heartbeats_under_its_cluster_id_and_polls_the_tunnel() -> None:
    profile = AgentProfile(heartbeat_interval_s=SOON_S, tunnel_interval_s=SOON_S)
    async with harness(lambda call: REGISTERED if call.path.endswith("/register") else http(204), profile) as it:
        async with it.running():
            await it.until(EventKind.HEARTBEAT, count=3)
            await it.until(EventKind.TUNNEL, CallOutcome.REFUSED, count=2)
        assert len(it.server.of("/register")) == 1
        assert it.server.calls[0].path.endswith("/register")
        assert {call.path for call in it.server.of("/heartbeat")} == {"/api/v1/clusters/agent/c-1/heartbeat"}
        assert it.agent.connections_opened == it.server.connections == 2


async def test_b_with_a_kept_id_never_registers_and_sends_its_first_heartbeat_at_once() -> None:
    async with harness(lambda call: http(204), AgentProfile(heartbeat_interval_s=3600), "kept") as it:
        async with it.running():
            await it.until(EventKind.HEARTBEAT)
        assert [call.path for call in it.server.calls] == ["/api/v1/clusters/agent/kept/heartbeat"]


async def test_b_exits_when_it_cannot_register_and_sends_nothing_more() -> None:
    async with harness(lambda call: http(503, {"error": "later"}), AgentProfile(tunnel_interval_s=SOON_S)) as it:
        async with asyncio.timeout(60):
            await it.agent.run()
        assert [event.what for event in it.events] == [EventKind.REGISTER, EventKind.EXIT]
        assert len(it.server.calls) == 1


async def test_a_goes_on_after_a_failed_registration_and_never_repeats_a_heartbeat() -> None:
    profile = AgentProfile(
        dialect="agents", heartbeat_interval_s=SOON_S, status_interval_s=SOON_S, retry_initial_s=3600
    )
    async with harness(lambda call: http(500), profile) as it:
        async with it.running():
            await it.until(EventKind.HEARTBEAT, CallOutcome.REFUSED, count=3)
            await it.until(EventKind.STATUS, CallOutcome.REFUSED)
        assert len(it.server.of("/register")) == 1


async def test_b3_without_a_cluster_id_skips_its_heartbeats() -> None:
    profile = AgentProfile(dialect="clusters", heartbeat_interval_s=SOON_S, tunnel_interval_s=SOON_S)
    async with harness(lambda call: http(200, {"status": "IDLE"}), profile) as it:
        async with it.running():
            await it.until(EventKind.TUNNEL, count=5)
        assert it.server.of("/heartbeat") == []


async def test_a_failed_heartbeat_is_repeated_with_growing_pauses_then_the_next_tick_starts_over() -> None:
    profile = AgentProfile(
        heartbeat_interval_s=SOON_S, retry_initial_s=SOON_S, retry_max_s=3 * SOON_S, retry_attempts=4
    )
    async with harness(lambda call: http(404), profile, "c-1") as it:
        async with it.running():
            failed = await it.until(EventKind.HEARTBEAT, CallOutcome.REFUSED, count=5)
        pauses = [after.started_s - before.at_s for before, after in pairwise(failed)]
        for pause, least in zip(pauses, (1, 2, 3), strict=False):
            assert pause >= least * SOON_S


async def test_commands_are_reported_carried_out_in_order_and_answered() -> None:
    seen: list[str] = []
    offered = [[{"id": "1", "type": "a"}, {"id": "2", "type": "b", "payload": {"x": 1}}]]

    def answer(call: Recorded) -> bytes:
        if call.path.endswith("/poll"):
            return http(200, {"commands": offered.pop() if offered else []})
        return http(204)

    async def execute(command: Command) -> Result:
        seen.append(command.id)
        return Result(success=command.type == "a", error="" if command.type == "a" else "no", metadata={"n": 1})

    profile = AgentProfile(poll_interval_s=SOON_S, heartbeat_interval_s=3600)
    async with harness(answer, profile, "c-1", execute=execute) as it:
        async with it.running():
            results = await it.until(EventKind.RESULT, count=2)
        in_hand = it.of(EventKind.COMMAND)
        assert seen == ["1", "2"] == [event.command.id for event in in_hand if event.command]
        assert max(event.at_s for event in in_hand) <= min(event.started_s for event in results)
        first, second = it.server.of("/result")
        assert (first.path, second.path) == tuple(f"/api/v1/clusters/agent/c-1/commands/{n}/result" for n in "12")
        assert (first.json["success"], "error" in first.json) == (True, False)
        assert (second.json["success"], second.json["error"], second.json["metadata"]) == (False, "no", {"n": 1})
        assert first.connection == it.server.of("/poll")[0].connection


async def test_a_refused_result_is_posted_again_and_then_given_up() -> None:
    profile = AgentProfile(dialect="agents", retry_initial_s=SOON_S)
    async with harness(lambda call: http(503), profile) as it:
        assert not await it.agent.answer(Command("1", "a"), Result())
        assert [event.outcome for event in it.events] == [CallOutcome.REFUSED] * 3
        assert it.events[0].command == Command("1", "a")


@pytest.mark.parametrize("style, beats", [(PollStyle.TICKER, True), (PollStyle.PAUSE, True), (PollStyle.SERIAL, False)])
async def test_only_a_serial_agent_sends_no_heartbeat_while_its_poll_is_held(style: PollStyle, beats: bool) -> None:
    release = asyncio.Event()

    async def answer(call: Recorded) -> bytes:
        if call.path.endswith("/poll") and not release.is_set():
            await release.wait()
        return http(200, {}) if call.path.endswith("/poll") else http(204)

    profile = AgentProfile(heartbeat_interval_s=SOON_S, poll_interval_s=4 * SOON_S, poll_style=style)
    async with (
        harness(answer, profile, "c-1") as it,
        harness(lambda call: http(204), profile, "c-2") as reference,
        it.running(),
        reference.running(),
    ):
        await it.server.until(lambda: it.server.of("/poll") != [])
        before = len(it.of(EventKind.HEARTBEAT))
        if beats:
            await it.until(EventKind.HEARTBEAT, count=before + 5)
        else:
            await reference.until(EventKind.HEARTBEAT, count=len(reference.of(EventKind.HEARTBEAT)) + 5)
            assert len(it.of(EventKind.HEARTBEAT)) == before
        release.set()
        await it.until(EventKind.HEARTBEAT, count=before + 6)


async def test_a_hook_can_make_a_call_badly_and_the_agent_lives_on() -> None:
    hung_up = 0

    async def call(exchange: Exchange) -> Response:
        nonlocal hung_up
        if exchange.what is EventKind.POLL and hung_up == 0:
            hung_up += 1
            connection = await exchange.pool.dial()
            await connection.send(exchange.pool.encode(exchange.request))
            exchange.pool.discard(connection)
            raise WireError("hung up")
        return await exchange.send()

    profile = AgentProfile(heartbeat_interval_s=3600, poll_interval_s=SOON_S)
    async with harness(lambda call: http(200, {}), profile, "c-1", call=call) as it:
        async with it.running():
            await it.until(EventKind.POLL)
        assert [event.detail for event in it.of(EventKind.POLL, CallOutcome.FAILED)] == ["hung up"]


async def test_a_server_that_is_gone_is_an_event_and_no_crash() -> None:
    async with harness(lambda call: None, AgentProfile(dialect="agents")) as it:
        assert not await it.agent.heartbeat()
        assert it.events[0].outcome is CallOutcome.FAILED
        assert it.events[0].status == 0


async def test_timeouts_scale_with_the_intervals() -> None:
    profile = AgentProfile(retry_initial_s=5).scaled(0.001)
    never = asyncio.Event()

    async def answer(call: Recorded) -> None:
        await never.wait()

    async with harness(answer, profile, "c-1") as it:
        assert (profile.heartbeat_interval_s, profile.retry_initial_s, profile.poll_interval_s) == (0.005, 0.005, None)
        assert not await it.agent.heartbeat()
        assert it.events[0].detail == "timeout"
        never.set()


@pytest.mark.parametrize("dialect", GENERATIONS)
def test_defaults_are_the_intervals_of_real_agents(dialect: str) -> None:
    profile = AgentProfile(dialect=dialect, poll_interval_s=30)
    assert profile.beat_s == (5 if dialect == "clusters_agent" else 30)
    assert profile.drains == (dialect != "clusters")


async def test_b3_has_no_commands_to_drain_or_answer() -> None:
    async with harness(lambda call: http(204), AgentProfile(dialect="clusters")) as it:
        with pytest.raises(NotImplementedError):
            await it.agent.poll()
        with pytest.raises(NotImplementedError):
            await it.agent.answer(Command("1", "a"), Result())
