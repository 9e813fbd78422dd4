"""Common part of all demo scenarios: console, controller, agents and their end."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from typing import Any

from devtools.agents import CallOutcome, Event, EventKind
from devtools.controller.client import ControlError, control_client
from devtools.demo.console import Console
from devtools.demo.demo_agent import TOKEN, ControllerEvents, DemoAgent
from devtools.demo.processes import ChildProcess
from shim.clock import Clock


class Scenario(ABC):
    """A scenario that reports on a console. The creator of the child processes stops them, also after a failure."""

    def __init__(self, stage: Console, clock: Clock, children: Sequence[ChildProcess]) -> None:
        """Keep the participants; the first child process is the controller."""
        self.children = children
        self.told = False
        self._stage = stage
        self._clock = clock
        self._controller = children[0]
        self._addresses: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._group: asyncio.TaskGroup
        self._agents: list[DemoAgent] = []

    @abstractmethod
    async def tell(self, group: asyncio.TaskGroup) -> None:
        """Run all sections; agents and guards of the child processes run in `group`.

        Raises `StepFailed` at the first step that fails; a process that ends unexpectedly fails the group.
        """

    @abstractmethod
    def show_commands(self) -> None:
        """Print commands to try."""

    async def stay(self) -> None:
        """Leave everything running and show the events, until cancelled."""
        for agent in self._agents:
            agent.listener = self._show_live
        self.show_commands()
        async with control_client(f"http://{self._addresses['controller']}") as control:
            _, after = await control.events(0, 0)
            while True:
                events, after = await control.events(after, 60, kind="opened,closed")
                for event in events:
                    self._stage.happened(f"link {event['kind']}", f"connection {event['connection']}")

    def dismiss(self) -> None:
        """End the agents and all other tasks of the group."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, coro: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(self._group.create_task(coro))

    async def _start_controller(self, listen: str, *accepted: str) -> None:
        accepted = accepted or ("--token", TOKEN)
        ready = await self._controller.start(["controller", "--listen", listen, *accepted])
        self._spawn(self._controller.guard())
        self._addresses["controller"] = ready["listen"]

    async def _push(self, agent: DemoAgent, watch: ControllerEvents, kind: str) -> tuple[float, str]:
        """Push a command of a type to the agent; return the time of sending (monotonic seconds) and its id."""
        sent = await watch.control.push({"type": kind, "cluster_id": agent.legacy.cluster_id})
        if not sent["sent"]:
            raise ControlError("the controller could not send the command")
        return sent["sent_monotonic_s"], sent["id"]

    def _show_tries(self, tries: Sequence[tuple[str, str]]) -> None:
        self._stage.headline("All of it keeps running. In another terminal, try:")
        for comment, line in tries:
            self._stage.note(f"# {comment}")
            self._stage.plain(f"  {line}")
        self._stage.headline("Ctrl-C ends it.")

    def _show_live(self, event: Event) -> None:
        if event.what is EventKind.COMMAND and event.command:
            self._stage.happened("command in the agent's hand", f"{event.command.type}, {event.command.id}")
        elif event.what is EventKind.RESULT and event.command:
            self._stage.happened("result posted", f"HTTP {event.status}, {event.command.id}")
        elif event.outcome is not CallOutcome.OK:
            self._stage.happened(f"{event.what.value} {event.outcome.value}", event.detail or f"HTTP {event.status}")
