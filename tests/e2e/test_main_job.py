"""The main job with real processes: unmodified agents of every generation, the controller going away in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from devtools.agents import AgentProfile, Callbacks, CallOutcome, Command, Event, EventKind, Identity, LegacyAgent
from shim.clock import Clock
from tests.support.processes import TOKEN, Controller, Shim, world

FAST = {"upstream": {"heartbeat_interval_s": 2.0}, "poll": {"hold": "off"}}


class Life:
    """A running agent and what happened to it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._grown = asyncio.Event()

    def on(self, event: Event) -> None:
        self.events.append(event)
        self._grown.set()

    async def until(self, what: EventKind, count: int = 1, outcome: CallOutcome = CallOutcome.OK) -> list[Event]:
        async with asyncio.timeout(60):
            while len(found := self.of(what, outcome)) < count:
                self._grown.clear()
                await self._grown.wait()
        return found

    def of(self, what: EventKind, outcome: CallOutcome = CallOutcome.OK) -> list[Event]:
        return [event for event in self.events if event.what is what and event.outcome is outcome]

    @property
    def bad(self) -> list[Event]:
        return [event for event in self.events if event.outcome is not CallOutcome.OK]

    @property
    def commands(self) -> list[Command]:
        return [event.command for event in self.of(EventKind.COMMAND) if event.command is not None]


@asynccontextmanager
async def living(
    shim: Shim, dialect: str, agent_id: str = "agent-1", cluster_id: str = "", token: str = TOKEN
) -> AsyncIterator[tuple[LegacyAgent, Life]]:
    """An agent of a generation that lives a hundred times as fast as real ones."""
    life = Life()
    who = Identity(agent_id=agent_id, cluster_name="prod-cluster", token=token, tunnel_enabled=True)
    profile = AgentProfile(
        dialect=dialect,
        heartbeat_interval_s=0.05,
        poll_interval_s=0.05,
        tunnel_interval_s=0.05,
        status_interval_s=0.1 if dialect == "agents" else None,
    )
    agent = LegacyAgent(shim.url, who, profile, Clock(), Callbacks(event=life.on), cluster_id)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(agent.run())
        yield agent, life
        task.cancel()


async def push(controller: Controller, **spec: Any) -> str:
    command = await controller.api.push({"type": "scale", "payload": {"replicas": 3}, **spec})
    return str(command["id"])


async def result_of(controller: Controller, command_id: str) -> dict[str, Any]:
    """What the controller got for a command."""
    command = await controller.control("GET", f"/control/commands/{command_id}?wait=result&timeout_s=60")
    payload: dict[str, Any] = command["results"][0]["payload"]
    return payload


@pytest.mark.parametrize("dialect", ["clusters_agent", "agents", "clusters"])
async def test_every_generation_is_served_while_the_controller_goes_away_and_comes_back(
    dialect: str, tmp_path: Path
) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        async with living(shim, dialect) as (agent, life):
            await life.until(EventKind.REGISTER)
            await controller.until(type="heartbeat", direction="in")
            if agent.profile.drains:
                first = await push(controller)
                assert (await result_of(controller, first))["success"] is True

            if dialect == "agents":
                await controller.until(type="status", direction="in")

            await controller.kill()
            await shim.event("link_lost")
            before = len(life.of(EventKind.HEARTBEAT))
            await life.until(EventKind.HEARTBEAT, before + 5)  # its answers do not change
            await controller.start()
            registers = await controller.until(type="register", direction="in")
            assert registers[0]["payload"]["name"] == "prod-cluster"
            await controller.until(type="heartbeat", direction="in")
            await life.until(EventKind.TUNNEL, len(life.of(EventKind.TUNNEL)) + 1)
            if agent.profile.drains:
                second = await push(controller)
                result = await result_of(controller, second)
                assert result["output"] == "done scale"
                assert [command.id for command in life.commands] == [first, second]
            assert life.bad == []
        assert await shim.stop() == 0


async def test_a_restarted_shim_serves_an_agent_that_never_registers_again(tmp_path: Path) -> None:
    async with world(tmp_path, FAST) as (shim, controller):
        await shim.start()
        async with living(shim, "clusters_agent") as (agent, life):
            await life.until(EventKind.HEARTBEAT)
            cluster_id = agent.cluster_id
        pushed = await push(controller, cluster_id=cluster_id)
        await shim.event("command_queued")
        await shim.kill()
        after = len(shim.lines)
        await shim.start()
        async with living(shim, "clusters_agent", agent_id="another-pod", cluster_id=cluster_id) as (agent, life):
            assert (await result_of(controller, pushed))["success"] is True
            assert life.of(EventKind.REGISTER) == []
            assert life.bad == []
            # the controller was told who heartbeats: the stored registration was replayed first
            assert await shim.event("session_registered", after, session=cluster_id)


async def test_an_agent_whose_cluster_the_shim_never_saw_is_adopted(tmp_path: Path) -> None:
    async with world(tmp_path, FAST, "--lenient") as (shim, controller):
        await shim.start()
        async with living(shim, "clusters_agent", cluster_id="cl-from-long-ago") as (_, life):
            beats = await controller.until(type="heartbeat", direction="in")
            assert beats[0]["payload"]["cluster_id"] == "cl-from-long-ago"
            pushed = await push(controller, connection=1, fields={"cluster_id": "cl-from-long-ago"})
            assert (await result_of(controller, pushed))["success"] is True
            assert life.bad == []


async def test_an_adopted_agent_that_the_controller_does_not_know_is_registered_by_its_configured_name(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, {**FAST, "identity": {"name": "named-by-hand"}}) as (shim, controller):
        await shim.start()
        async with living(shim, "clusters_agent", cluster_id="cl-from-long-ago") as (_, life):
            register = (await controller.until(type="register", direction="in"))[0]["payload"]
            assert (register["name"], register["cluster_id"]) == ("named-by-hand", "cl-from-long-ago")
            pushed = await push(controller, cluster_id="cl-from-long-ago")
            assert (await result_of(controller, pushed))["success"] is True
            assert life.bad == []


async def test_agents_own_tokens_open_their_own_links_and_see_only_their_own(tmp_path: Path) -> None:
    config = {**FAST, "upstream": {"heartbeat_interval_s": 2.0, "token": ""}}
    async with world(tmp_path, config, "--token", "tok-of-another") as (shim, controller):
        await shim.start()
        async with (
            living(shim, "clusters_agent", "agent-1") as (one, first),
            living(shim, "clusters_agent", "agent-2", token="tok-of-another") as (two, second),
        ):
            await first.until(EventKind.HEARTBEAT)
            await second.until(EventKind.HEARTBEAT)
            assert one.cluster_id != two.cluster_id
            pushed = await push(controller, cluster_id=one.cluster_id)
            assert (await result_of(controller, pushed))["success"] is True
            assert [command.id for command in first.commands] == [pushed]
            assert second.commands == []
        async with living(shim, "clusters_agent", "agent-3", token="tok-that-is-refused") as (_, refused):
            events = await refused.until(EventKind.REGISTER, outcome=CallOutcome.REFUSED)
            assert events[0].status == 401
