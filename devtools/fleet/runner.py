"""Many simulated agents at once: created from a plan, run until stopped, and counted meanwhile."""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from devtools.agents import AgentProfile, Callbacks, CallOutcome, Event, EventKind, Identity, LegacyAgent
from shim.clock import Clock

_VITAL = frozenset(
    {EventKind.REGISTER, EventKind.HEARTBEAT, EventKind.POLL, EventKind.RESULT, EventKind.STATUS, EventKind.TUNNEL}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Agents to run. Profiles are assigned in turn; agents start evenly over `spread_s` seconds.

    An agent whose process exits is started again after `restart_s`, like Kubernetes' first restart.
    """

    url: str
    agents: int
    profiles: tuple[AgentProfile, ...]
    token: str = field(repr=False)
    prefix: str = "fleet"
    spread_s: float = 0
    restart_s: float = 10


class FleetStats:
    """Events of a fleet, counted by kind of call and outcome."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[EventKind, CallOutcome]] = Counter()
        self.took_s: defaultdict[EventKind, array[float]] = defaultdict(lambda: array("d"))
        self.alive: set[str] = set()
        self._failing: dict[tuple[str, EventKind], str] = {}
        self._spoilt: dict[str, str] = {}

    def record(self, event: Event) -> None:
        """Count an event."""
        self.counts[event.what, event.outcome] += 1
        key = (event.agent_id, event.what)
        if event.outcome is CallOutcome.OK:
            self._failing.pop(key, None)
            if event.what is not EventKind.COMMAND:
                self.took_s[event.what].append(event.at_s - event.started_s)
            if event.what in (EventKind.REGISTER, EventKind.HEARTBEAT):
                self.alive.add(event.agent_id)
            return
        reason = f"{event.what.value}: {event.detail or f'status {event.status}'}"
        if event.outcome is CallOutcome.UNDECODABLE:
            self._spoilt.setdefault(event.agent_id, reason)
        if event.what in _VITAL:
            self._failing[key] = reason

    def failing(self) -> dict[str, str]:
        """Return the failing agents by id, each with a reason.

        A reply that an agent could not decode counts permanently; other failures until the same call succeeds again.
        """
        return {agent_id: reason for (agent_id, _), reason in self._failing.items()} | self._spoilt


class Fleet:
    """The agents of a plan."""

    def __init__(self, plan: FleetPlan, clock: Clock, callbacks: Callbacks) -> None:
        """Create the agents. They share `callbacks`; events and exchanges carry the agent's id."""
        self._plan = plan
        self.agents = [self._agent(number, clock, callbacks) for number in range(plan.agents)]

    def _agent(self, number: int, clock: Clock, callbacks: Callbacks) -> LegacyAgent:
        plan = self._plan
        name = f"{plan.prefix}-{number + 1}"
        profile = plan.profiles[number % len(plan.profiles)]
        who = Identity(agent_id=f"agent-{name}", cluster_name=name, token=plan.token)
        return LegacyAgent(plan.url, who, profile, clock, callbacks)

    @property
    def connections_opened(self) -> int:
        """Return the number of TCP connections that all agents opened."""
        return sum(agent.connections_opened for agent in self.agents)

    async def run(self, stop: asyncio.Event) -> None:
        """Run all agents until `stop` is set; then end all at once, including calls in progress."""
        plan = self._plan
        async with asyncio.TaskGroup() as group:
            lives = [
                group.create_task(self._live(agent, plan.spread_s * number / plan.agents))
                for number, agent in enumerate(self.agents)
            ]
            await stop.wait()
            for life in lives:
                life.cancel()

    async def _live(self, agent: LegacyAgent, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await agent.run()
            await asyncio.sleep(self._plan.restart_s)
