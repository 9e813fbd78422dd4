"""The demo's agent, and the observers of agent and controller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from devtools.agents import (
    AgentProfile,
    Callbacks,
    CallOutcome,
    Command,
    Event,
    EventKind,
    Exchange,
    Identity,
    LegacyAgent,
    Response,
    Result,
)
from devtools.controller.client import ControlClient
from shim.clock import Clock

BEAT_S = 0.4
POLL_S = 2.5
SLOW = "slow"  # a command that takes as long as the demo wants
TOKEN = "demo"  # noqa: S105 - nothing real behind it


class DemoAgent:
    """One legacy agent of the latest generation with shortened intervals, and a record of its events."""

    def __init__(self, url: str, clock: Clock, number: int = 0, token: str = TOKEN) -> None:
        profile = AgentProfile(
            heartbeat_interval_s=BEAT_S, poll_interval_s=POLL_S, retry_initial_s=BEAT_S, retry_max_s=1
        )
        who = Identity(
            agent_id=f"agent-demo-{number}", cluster_name=f"demo-{number}" if number else "demo", token=token
        )
        callbacks = Callbacks(event=self._record, execute=self._execute, call=self._call)
        self.legacy = LegacyAgent(url, who, profile, clock, callbacks)
        self.events: list[Event] = []
        self.listener: Callable[[Event], None] | None = None
        self.release = asyncio.Event()
        self.polling = False
        self._changed = asyncio.Event()

    async def event(
        self, what: EventKind, since: int = 0, outcome: CallOutcome = CallOutcome.OK, **command: str
    ) -> Event:
        """Wait for the first event of a kind from number `since` on; `id` or `type` may select its command."""
        while True:
            for event in self.events[since:]:
                if (event.what, event.outcome) == (what, outcome) and _fits(event.command, command):
                    return event
            await self._wait()

    async def count(self, what: EventKind, number: int, since: int) -> list[Event]:
        """Wait for this number of successes of a kind from number `since` on."""
        while True:
            found = [event for event in self.events[since:] if (event.what, event.outcome) == (what, CallOutcome.OK)]
            if len(found) >= number:
                return found
            await self._wait()

    async def in_poll(self) -> None:
        """Wait until a poll has been sent or is held."""
        while not self.polling:
            await self._wait()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _record(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()
        if self.listener:
            self.listener(event)

    async def _execute(self, command: Command) -> Result:
        if command.type == SLOW:
            await self.release.wait()
        return Result(output=f"done: {command.type}")

    async def _call(self, exchange: Exchange) -> Response:
        if exchange.what is not EventKind.POLL:
            return await exchange.send()
        self.polling = True
        self._changed.set()
        try:
            return await exchange.send()
        finally:
            self.polling = False


def _fits(command: Command | None, wanted: dict[str, str]) -> bool:
    return all(command is not None and getattr(command, key) == value for key, value in wanted.items())


class ControllerEvents:
    """Events at the controller, in order."""

    def __init__(self, control: ControlClient) -> None:
        self.control = control

    async def event(self, kind: str, since: int, **wanted: str) -> dict[str, Any]:
        """Wait for the first event of a kind after number `since` with these fields in it or in its payload."""
        after = since
        while True:
            found, after = await self.control.events(after, 5, kind=kind)
            for event in found:
                if all(
                    wanted_value in (event.get(key), event.get("payload", {}).get(key))
                    for key, wanted_value in wanted.items()
                ):
                    return event

    async def count(self, kind: str, message_type: str, since: int) -> int:
        """Return the number of messages of a type after number `since`."""
        found, _ = await self.control.events(since, 0, kind=kind, type=message_type)
        return len(found)
