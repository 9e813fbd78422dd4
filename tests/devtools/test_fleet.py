"""The fleet: as a process against a small legacy server with a control API, and its parts."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from devtools.agents import AgentProfile, Callbacks, CallOutcome, Command, Event, EventKind, Response
from devtools.controller.client import ControlClient, ControlError, control_client
from devtools.fleet.command_load import CommandLoad
from devtools.fleet.report import lines, report
from devtools.fleet.runner import Fleet, FleetPlan, FleetStats
from shim.clock import Clock
from tests.support.recording_server import Recorded, RecordingServer, http

CLOCK = Clock()
IGNORE = Callbacks(event=lambda event: None)


@dataclass
class Legacy:
    """Answers every dialect well, and hands out what is pushed through its control API."""

    queues: defaultdict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    deliver: bool = True
    refuse_push: bool = False
    unsent: bool = False

    def __call__(self, call: Recorded) -> bytes:
        parts = call.path.strip("/").split("/")
        if parts[-1] == "register" or (parts[0] == "clusters" and len(parts) == 2):
            ident = "c-" + (call.json.get("agent_id") or call.json["id"])
            return http(200, {"cluster_id": ident, "cluster": {"id": ident}})
        if parts[-1] in ("poll", "commands") and call.method == "GET":
            waiting = self.queues.pop(parts[-2], []) if self.deliver else []
            return http(200, {"commands": waiting})
        if parts[-2:] == ["tunnel", "status"]:
            return http(200, {"status": "IDLE"})
        if call.path == "/control/commands":
            return self._push(call.json)
        return http(204)

    def _push(self, spec: dict[str, Any]) -> bytes:
        if self.refuse_push:
            return http(409, {"success": False, "error": "no open connection speaks for this target"})
        if self.unsent:
            return http(200, {"success": True, "commands": [{"sent": False, "sent_monotonic_s": None}]})
        command = {"id": spec["id"], "type": spec["type"], "payload": spec["payload"]}
        self.queues[spec.get("cluster_id") or spec["agent_id"]].append(command)
        return http(200, {"success": True, "commands": [{"sent": True, "sent_monotonic_s": CLOCK.monotonic_s()}]})


async def fleet(*args: str, end: Awaitable[None] | None = None, files: int | None = None) -> tuple[int, str, str]:
    """Run `agent-shim fleet`, with a limit of open files; exit code, stdout, stderr. Ctrl-C comes after `end`."""
    limited = ("prlimit", f"--nofile={files}") if files else ()
    process = await asyncio.create_subprocess_exec(
        *(*limited, sys.executable, "-m", "shim", "fleet", *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    if end is not None:
        try:
            await end
        finally:
            process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


FAST = ("--heartbeat-interval", "0.02", "--poll-interval", "0.02", "--spread", "0.05")
# A machine may be slow: what the test waits for ends the run, not a time.
LONG = ("--duration", "3600")


async def test_a_mixed_fleet_pushes_measures_and_reports(tmp_path: Path) -> None:
    async with RecordingServer(Legacy()) as server:
        file = tmp_path / "report.json"

        def seen() -> bool:
            beating = {call.path for call in server.of("/heartbeat")}
            tunnel = any(call.path.startswith("/api/agents/") for call in server.calls)
            return len(beating) == 6 and tunnel and len(server.of("/result")) >= 20

        code, out, err = await fleet(
            *("--url", server.url, "--agents", "6", *LONG, "--json", str(file), *FAST),
            *("--control", f"{server.url}/control", "--rate", "40", "--tunnel-interval", "0.1", "--warm-up", "0"),
            end=server.until(seen),
        )
        assert (code, err) == (0, ""), out
        found = json.loads(file.read_text())
        assert found["good"]
        assert found["dialects"] == {"clusters_agent": 2, "agents": 2, "clusters": 2}
        assert {call["what"]: call["ok"] for call in found["calls"]}["register"] == 6
        commands = found["commands"]
        assert commands["sent"] == commands["in_hand"] == commands["answered"] > 0
        assert 0 < commands["latency"]["p50_s"] <= commands["latency"]["p99_s"]
        assert "failing agents: 0" in out
        assert "│" in out


async def test_no_command_is_pushed_while_the_agents_warm_up() -> None:
    async with RecordingServer(Legacy()) as server:
        began_s = CLOCK.monotonic_s()
        first_s: list[float] = []

        async def first_command() -> None:
            await server.until(lambda: bool(server.of("/control/commands")))
            first_s.append(CLOCK.monotonic_s())
            await server.until(lambda: len(server.of("/result")) >= 3)

        code, out, err = await fleet(
            *("--url", server.url, "--agents", "2", *LONG, "--warm-up", "4", "--json", "-", *FAST),
            *("--control", f"{server.url}/control", "--rate", "40"),
            end=first_command(),
        )
        assert (code, err) == (0, ""), out
        assert json.loads(out)["commands"]["sent"] > 0
        assert first_s[0] - began_s > 4


async def test_failing_agents_make_exit_code_1(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("from-file\n")
    async with RecordingServer(lambda call: http(503, {"error": "later"})) as server:
        # An agent's process that has ended has read the answer.
        code, out, _ = await fleet(
            *("--url", server.url, "--agents", "2", "--dialect", "clusters_agent", *LONG, *FAST),
            *("--token-file", str(token), "--json", "-"),
            end=server.until(lambda: server.closed >= 2),
        )
        assert code == 1
        assert not json.loads(out)["good"]
        assert json.loads(out)["failing"]["agent-fleet-1"].startswith("register: status 503")
        assert {dict(map(tuple, call.headers))["Authorization"] for call in server.calls} == {"Bearer from-file"}


async def test_ctrl_c_ends_it_early_with_a_report() -> None:
    async with RecordingServer(Legacy()) as server:
        code, out, _ = await fleet(
            *("--url", server.url, "--agents", "1", *LONG, "--spread", "0"),
            end=server.until(lambda: len(server.of("/heartbeat")) == 1),
        )
        assert code == 0
        assert "1 agent (1 clusters_agent)" in out


async def test_it_ends_by_itself_after_its_duration() -> None:
    # Nothing answers, so that it is the same report on any machine.
    code, out, _ = await fleet("--url", "http://127.0.0.1:1", "--agents", "1", "--duration", "0.1", "--json", "-")
    assert code == 1
    assert list(json.loads(out)["failing"]) == ["agent-fleet-1"]


async def test_too_few_open_files_are_a_warning() -> None:
    async with RecordingServer(Legacy()) as server:
        code, _, err = await fleet(
            *("--url", server.url, "--agents", "1", *LONG),
            end=server.until(lambda: bool(server.of("/heartbeat"))),
            files=200,
        )
        assert code == 0
        assert "only 200 open files are allowed here" in err


@pytest.mark.parametrize(
    "args, text",
    [
        (["--url", "127.0.0.1:1"], "the URL must be"),
        (["--url", "http://127.0.0.1:1", "--control", "nowhere"], "the URL must be"),
        (["--url", "http://127.0.0.1:1", "--control", "http://127.0.0.1:1", "--poll-interval", "0"], "do not poll"),
        (["--url", "http://127.0.0.1:1", "--control", "http://127.0.0.1:1", "--dialect", "clusters"], "do not poll"),
        (["--url", "http://127.0.0.1:1", "--agents", "0"], "agents"),
    ],
)
async def test_what_makes_no_sense_is_refused(args: list[str], text: str) -> None:
    code, _, err = await fleet(*args)
    assert code == 2
    assert text in err


# --- parts


def event(what: EventKind, outcome: CallOutcome = CallOutcome.OK, agent_id: str = "a", **rest: Any) -> Event:
    return Event(agent_id, what, outcome, 1.0, 1.5, **rest)


def test_an_agent_fails_until_the_same_call_succeeds_again() -> None:
    tally = FleetStats()
    tally.record(event(EventKind.HEARTBEAT, CallOutcome.FAILED, detail="timeout"))
    tally.record(event(EventKind.POLL))
    assert tally.failing() == {"a": "heartbeat: timeout"}
    tally.record(event(EventKind.HEARTBEAT))
    assert tally.failing() == {}
    assert list(tally.took_s[EventKind.HEARTBEAT]) == [0.5]


def test_an_undecodable_reply_is_never_forgiven() -> None:
    tally = FleetStats()
    tally.record(event(EventKind.POLL, CallOutcome.UNDECODABLE, detail="the commands reply does not decode"))
    tally.record(event(EventKind.POLL))
    assert tally.failing() == {"a": "poll: the commands reply does not decode"}


async def test_an_agent_that_exits_is_started_again_and_then_well() -> None:
    answers = iter([http(503)])
    legacy = Legacy()
    tally, stop = FleetStats(), asyncio.Event()

    def listen(event: Event) -> None:
        tally.record(event)
        if event.what is EventKind.HEARTBEAT:
            stop.set()

    async with RecordingServer(lambda call: next(answers, None) or legacy(call)) as server:
        plan = FleetPlan(url=server.url, agents=1, profiles=(AgentProfile(),), token="t", restart_s=0.001)
        herd = Fleet(plan, CLOCK, Callbacks(event=listen))
        async with asyncio.timeout(60):
            await herd.run(stop)
        assert tally.counts[EventKind.EXIT, CallOutcome.FAILED] == 1
        assert tally.failing() == {}
        assert herd.connections_opened == 2


def test_silent_agents_fail_and_long_lists_are_cut() -> None:
    plan = FleetPlan(url="http://127.0.0.1:1", agents=7, profiles=(AgentProfile(dialect="agents"),), token="t")
    found = report(1.0, Fleet(plan, CLOCK, IGNORE).agents, FleetStats(), None)
    assert not found.good
    shown = lines(found)
    assert shown[-1] == "  …"
    assert "failing agents: 7" in shown


async def test_refused_pushes_are_told_and_a_run_without_any_command_is_not_good() -> None:
    legacy = Legacy(refuse_push=True)
    async with RecordingServer(legacy) as server, control_client(server.url, "secret") as control:
        pusher = CommandLoad(control, CLOCK)
        plan = FleetPlan(url=server.url, agents=1, profiles=(AgentProfile(poll_interval_s=1),), token="t")
        agents = Fleet(plan, CLOCK, Callbacks(event=pusher.record, call=pusher.call)).agents
        await pusher.run(agents, 1000, 0.003)
        assert server.calls == []
        await agents[0].poll()
        agents[0].close()
        await pusher.run(agents, 1000, 0.003)
        assert dict(map(tuple, server.calls[-1].headers))["Authorization"] == "Bearer secret"
        found = report(1.0, agents, FleetStats(), pusher)
        assert found.commands is not None
        assert list(found.commands.refused.values()) == [3]
        assert not found.good
        assert any("3 times: the control API refused: 409" in line for line in lines(found))


async def test_what_the_controller_could_not_send_is_not_counted_as_sent() -> None:
    async with RecordingServer(Legacy(unsent=True)) as server, control_client(server.url) as control:
        pusher = CommandLoad(control, CLOCK)
        plan = FleetPlan(url=server.url, agents=1, profiles=(AgentProfile(poll_interval_s=1),), token="t")
        agents = Fleet(plan, CLOCK, Callbacks(event=pusher.record, call=pusher.call)).agents
        await agents[0].poll()
        agents[0].close()
        await pusher.run(agents, 1000, 0.001)
        assert (pusher.pushed, pusher.refused) == (0, ["the controller could not send it"])


async def test_a_command_that_never_arrives_is_lost_after_the_grace() -> None:
    legacy = Legacy(deliver=False)
    async with RecordingServer(legacy) as server, control_client(server.url) as control:
        pusher = CommandLoad(control, CLOCK)
        plan = FleetPlan(url=server.url, agents=1, profiles=(AgentProfile(poll_interval_s=1),), token="t")
        agents = Fleet(plan, CLOCK, Callbacks(event=pusher.record, call=pusher.call)).agents
        await agents[0].poll()
        agents[0].close()
        await pusher.run(agents, 1000, 0.001)
        await pusher.settle(0.001)
        assert len(pusher.lost()) == 1
        late = Command(pusher.lost()[0], "fleet")
        pusher.record(event(EventKind.COMMAND, agent_id="agent-fleet-1", command=late))
        pusher.record(
            event(EventKind.RESULT, agent_id="agent-fleet-1", command=late, response=Response(204, {}, b"", 1))
        )
        await pusher.settle(10)
        assert (pusher.lost(), pusher.pushed, pusher.answered) == ([], 1, 1)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"success": false, "error": "no"}'])
async def test_what_is_no_control_api_is_said(body: bytes) -> None:
    async with RecordingServer(lambda call: http(200, body)) as server, control_client(server.url) as control:
        with pytest.raises(ControlError, match="control API"):
            await control.events(0, 0)


async def test_a_control_api_that_is_not_there_is_said() -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ControlError, match="does not answer"):
            await ControlClient(session, "http://127.0.0.1:1").events(0, 0)
