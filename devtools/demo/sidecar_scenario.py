"""Steps of the demo, each of which waits for an event that measures its duration."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from devtools.agents import EventKind
from devtools.controller.client import control_client
from devtools.demo.console import Console
from devtools.demo.demo_agent import BEAT_S, POLL_S, SLOW, TOKEN, ControllerEvents, DemoAgent
from devtools.demo.processes import ChildProcess
from devtools.demo.scenario import Scenario
from shim.clock import Clock
from shim.core.text import plural

_HOLD_S = 10
_BEATS = 6


class SidecarScenario(Scenario):
    """One agent, one shim, one controller: a command, and then an end of shim and controller in turn."""

    def __init__(self, stage: Console, clock: Clock, controller: ChildProcess, shim: ChildProcess, store: Path) -> None:
        super().__init__(stage, clock, (controller, shim))
        self._shim = shim
        self._store = store

    async def tell(self, group: asyncio.TaskGroup) -> None:
        self._stage.headline("agent-shim demo: an unmodified legacy agent, through the shim, over a real WebSocket")
        self._group = group
        await self._open()
        async with control_client(f"http://{self._addresses['controller']}") as control:
            watch = ControllerEvents(control)
            agent = DemoAgent(f"http://{self._addresses['shim']}", self._clock)
            self._agents.append(agent)
            await self._link_up(watch)
            await self._agent_arrives(agent, watch)
            await self._command_through(agent, watch)
            await self._controller_dies(agent, watch)
            await self._shim_dies(agent, watch)
        self.told = True

    def show_commands(self) -> None:
        """Print commands to try."""
        legacy = f"http://{self._addresses['shim']}/api/v1/clusters/agent"
        control = f"http://{self._addresses['controller']}/control"
        cluster = self._agents[0].legacy.cluster_id
        self._show_tries(_tries(legacy, control, f"http://{self._addresses['admin']}", cluster))

    # --- sections

    async def _open(self) -> None:
        async with self._stage.step("development controller listens") as step:
            await self._start_controller("127.0.0.1:0")
            step.detail = f"ws://{self._addresses['controller']}/api/v1/clusters/agent/ws"
        async with self._stage.step("shim serves the old HTTP API") as step:
            await self._start_shim("127.0.0.1:0", "127.0.0.1:0")
            step.detail = f"http://{self._addresses['shim']}, admin {self._addresses['admin']}"

    async def _link_up(self, watch: ControllerEvents) -> None:
        async with self._stage.step("WebSocket link is up") as step:
            opened = await watch.event("opened", 0)
            step.detail = f"connection {opened['connection']}, token in the {' and '.join(opened['auth'])}"

    async def _agent_arrives(self, agent: DemoAgent, watch: ControllerEvents) -> None:
        self._stage.headline("An agent that was never changed")
        self._stage.note(f"It beats every {BEAT_S} s and polls every {POLL_S:g} s here; real ones take 5 s and more.")
        self._spawn(agent.legacy.run())
        async with self._stage.step("agent registered") as step:
            event = await agent.event(EventKind.REGISTER)
            step.took_s = event.at_s - event.started_s
            step.detail = f"HTTP {event.status}, cluster id {agent.legacy.cluster_id}"
        async with self._stage.step("heartbeats coalesced") as step:
            beats = await agent.count(EventKind.HEARTBEAT, _BEATS, since=0)
            upstream = await watch.count("received", "heartbeat", 0)
            answer = {beat.status for beat in beats}
            step.detail = f"{len(beats)} from the agent (HTTP {answer.pop()}), {upstream} upstream"

    async def _command_through(self, agent: DemoAgent, watch: ControllerEvents) -> None:
        self._stage.headline("A command")
        async with self._stage.step("agent's poll is held open", POLL_S + _HOLD_S) as step:
            await agent.in_poll()
            step.detail = "the shim answers when there is something for it"
        async with self._stage.step("command pushed by the controller"):
            sent_s, ident = await self._push(agent, watch, "restart")
        async with self._stage.step("in the agent's hand") as step:
            in_hand = await agent.event(EventKind.COMMAND, id=ident)
            step.detail, step.took_s = "since the controller sent it", in_hand.at_s - sent_s
        async with self._stage.step("result back at the controller") as step:
            result = await watch.event("received", 0, type="command_result", command_id=ident)
            step.detail = f"since the controller sent it; “{result['payload'].get('output', '')}”"
            step.took_s = result["monotonic_s"] - sent_s

    async def _controller_dies(self, agent: DemoAgent, watch: ControllerEvents) -> None:
        self._stage.headline("The controller dies while the agent works on a command")
        async with self._stage.step("a slow command in hand", POLL_S + _HOLD_S) as step:
            await agent.in_poll()
            sent_s, ident = await self._push(agent, watch, SLOW)
            in_hand = await agent.event(EventKind.COMMAND, id=ident)
            step.detail, step.took_s = "since the controller sent it", in_hand.at_s - sent_s
        async with self._stage.step("controller killed (kill -9)"):
            await self._controller.kill()
        since = len(agent.events)
        async with self._stage.step("the agent notices nothing") as step:
            beats = await agent.count(EventKind.HEARTBEAT, 3, since)
            agent.release.set()
            posted = await agent.event(EventKind.RESULT, since, id=ident)
            step.detail = f"{len(beats)} heartbeats and the result answered, HTTP {beats[0].status} and {posted.status}"
        async with self._stage.step("controller back, link up again", 30) as step:
            await self._start_controller(self._addresses["controller"])
            back_s = self._clock.monotonic_s()
            opened = await watch.event("opened", 0)
            step.detail, step.took_s = "since it listens again", max(0.0, opened["monotonic_s"] - back_s)
        async with self._stage.step("registration replayed by the shim") as step:
            replayed = await watch.event("received", 0, type="register")
            step.detail = f"agent {replayed['payload'].get('agent_id')}, which sent none"
            step.took_s = replayed["monotonic_s"] - opened["monotonic_s"]
        async with self._stage.step("the kept result arrives") as step:
            result = await watch.event("received", 0, type="command_result", command_id=ident)
            step.detail, step.took_s = "since the agent posted it", result["monotonic_s"] - posted.at_s

    async def _shim_dies(self, agent: DemoAgent, watch: ControllerEvents) -> None:
        self._stage.headline("The shim dies with a command on its disk")
        agent.release.clear()
        async with self._stage.step("the agent is busy", POLL_S + _HOLD_S) as step:
            _, busy = await self._push(agent, watch, SLOW)
            await agent.event(EventKind.COMMAND, id=busy)
            step.detail = "it polls no more until it is done"
        async with self._stage.step("another command is on disk") as step:
            sent_s, ident = await self._push(agent, watch, "upgrade")
            ack = await watch.event("received", 0, type="command_ack", command_id=ident)
            step.detail, step.took_s = "synced, then acknowledged", ack["monotonic_s"] - sent_s
        since = len(agent.events)
        async with self._stage.step("shim killed (kill -9)"):
            await self._shim.kill()
        async with self._stage.step("shim serves again"):
            await self._start_shim(self._addresses["shim"], self._addresses["admin"])
        agent.release.set()
        async with self._stage.step("the command survived", 30) as step:
            in_hand = await agent.event(EventKind.COMMAND, since, id=ident)
            registers = sum(event.what is EventKind.REGISTER for event in agent.events[since:])
            step.detail = f"in hand since it was sent; {plural(registers, 'new registration')}"
            step.took_s = in_hand.at_s - sent_s
        async with self._stage.step("and so did its result", 30) as step:
            result = await watch.event("received", 0, type="command_result", command_id=ident)
            step.took_s = result["monotonic_s"] - in_hand.at_s
            step.detail = "at the controller, since it was in hand"

    # --- helpers

    async def _start_shim(self, listen: str, admin: str) -> None:
        values = {
            "upstream.url": f"ws://{self._addresses['controller']}",
            "upstream.token": TOKEN,
            "upstream.send_command_ack": "true",
            "listen.port": listen.rpartition(":")[2],
            "admin.port": admin.rpartition(":")[2],
            "store.path": str(self._store),
            "poll.hold": str(_HOLD_S),
        }
        args = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        ready = await self._shim.start(["run", *args])
        self._spawn(self._shim.guard())
        self._addresses |= {"shim": ready["listen"], "admin": ready["admin"]}


def _tries(legacy: str, control: str, admin: str, cluster: str) -> Sequence[tuple[str, str]]:
    push = f'{{"type": "hello", "payload": {{"from": "you"}}, "cluster_id": "{cluster}"}}'
    beat, new = '{"status": "healthy"}', '{"agent_id": "agent-you", "name": "yours"}'
    auth = f"-H 'Authorization: Bearer {TOKEN}'"
    return (
        ("push a command: the agent here has it at once", f"curl -s {control}/commands -d '{push}'"),
        ("what the controller saw", f"curl -s '{control}/messages?kind=received&type=command_result'"),
        (
            "be an agent: send a heartbeat",
            f"curl -i {legacy}/{cluster}/heartbeat {auth} -d '{beat}'",
        ),
        (
            "be a new agent: register",
            f"curl -s {legacy}/register {auth} -d '{new}'",
        ),
        ("make the controller drop the link, and see it come back", f"curl -s -X POST {control}/drop"),
        ("the shim's own view", f"curl -s {admin}/readyz; curl -s {admin}/metrics | grep agent_shim"),
    )
