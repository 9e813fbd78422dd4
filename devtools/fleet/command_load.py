"""Commands from a development controller to a fleet, with the latency of each from sending to receipt."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence

from devtools.agents import CallOutcome, Event, EventKind, Exchange, LegacyAgent, Response
from devtools.controller.client import ControlClient, ControlError
from shim.clock import Clock

_MAX_AT_ONCE = 64


class CommandLoad:
    """Pushes commands in turn to the agents that poll; the fleet's callbacks must be its `record` and `call`.

    The latency is the time from the controller's send to the agent's receipt, on the monotonic clock that all processes
    of one host share.
    """

    def __init__(self, control: ControlClient, clock: Clock) -> None:
        self._control = control
        self._clock = clock
        self._run_id = uuid.uuid4().hex[:8]
        self._sent_s: dict[str, float] = {}
        self._in_hand_s: dict[str, float] = {}
        self._answered: set[str] = set()
        self._polling: set[str] = set()
        self._changed = asyncio.Event()
        self.refused: list[str] = []

    def record(self, event: Event) -> None:
        """Record the receipt of a command."""
        if event.outcome is CallOutcome.OK and event.command is not None:
            if event.what is EventKind.COMMAND:
                self._in_hand_s.setdefault(event.command.id, event.at_s)
            else:
                self._answered.add(event.command.id)
            self._changed.set()

    async def call(self, exchange: Exchange) -> Response:
        """Make an agent's call. The first poll marks the agent as a recipient: by then it is registered upstream."""
        if exchange.what is EventKind.POLL:
            self._polling.add(exchange.agent_id)
        return await exchange.send()

    @property
    def pushed(self) -> int:
        """Return the number of commands that the controller sent."""
        return len(self._sent_s)

    @property
    def answered(self) -> int:
        """Return the number of pushed commands whose result an agent has posted."""
        return len(self._answered & self._sent_s.keys())

    def latencies_s(self) -> list[float]:
        """Return the latency of each pushed command that arrived."""
        return [self._in_hand_s[ident] - sent_s for ident, sent_s in self._sent_s.items() if ident in self._in_hand_s]

    def lost(self) -> list[str]:
        """Return the ids of pushed commands that have not arrived."""
        return [ident for ident in self._sent_s if ident not in self._in_hand_s]

    async def run(self, agents: Sequence[LegacyAgent], rate_hz: float, duration_s: float) -> None:
        """Push `rate_hz` commands a second for `duration_s` seconds."""
        pollers = [agent for agent in agents if agent.profile.drains]
        start_s = self._clock.monotonic_s()
        slots = asyncio.Semaphore(_MAX_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(math.floor(rate_hz * duration_s)):
                await asyncio.sleep(start_s + number / rate_hz - self._clock.monotonic_s())
                ready = [agent for agent in pollers if agent.who.agent_id in self._polling]
                if ready:
                    await slots.acquire()
                    group.create_task(self._push(ready[number % len(ready)], number, slots))

    async def settle(self, grace_s: float) -> None:
        """Wait until all pushed commands are answered, for at most `grace_s` seconds."""
        try:
            async with asyncio.timeout(grace_s):
                while self.answered < self.pushed:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _push(self, agent: LegacyAgent, number: int, slots: asyncio.Semaphore) -> None:
        ident = f"{self._run_id}-{number}"
        target = {"cluster_id": agent.cluster_id} if agent.cluster_id else {"agent_id": agent.who.agent_id}
        try:
            sent = await self._control.push({"id": ident, "type": "fleet", "payload": {"number": number}} | target)
        except ControlError as error:
            self.refused.append(str(error))
        else:
            if sent["sent"]:
                self._sent_s[ident] = sent["sent_monotonic_s"]
            else:
                self.refused.append("the controller could not send it")
        finally:
            slots.release()
