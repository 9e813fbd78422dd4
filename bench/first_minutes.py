"""A new agent's first ten minutes, and bursts of commands, at the paces that the vendor's guide names: virtual time.

Beside each figure stands what no bridge can do better: the same commands, had every poll been held as long as it may be
(`poll.max_hold_s`) from the first one on. A poll ends with the command that it takes, so a further command waits for
the agent's next poll, whatever the bridge does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from bench import simulation
from bench.figures import Figure, Log
from bench.servers import Bench
from devtools.agents import AgentProfile, Callbacks, Event, EventKind, Identity, LegacyAgent, PollStyle
from devtools.agents.pacing import Ticker
from devtools.latency import percentile

SPARSE = "A new agent's first ten minutes, a command every two minutes, in virtual time"
DENSE = "A new agent's first ten minutes, a command every 26 s, in virtual time"
BURSTS = "Five commands within one polling interval, in virtual time"
PARTS = (SPARSE, DENSE, BURSTS)
FIRST_S = 600.0
LEARNT_S = 300.0
BURST = 5
MOST_HOLD_S = 20.0
OFF, BOUND = "hold off", "bound"

Rng = random.Random


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of agent: seconds between heartbeats and between polls; serial: both from one loop."""

    beat_s: float
    poll_s: float
    serial: bool

    @property
    def name(self) -> str:
        """The case as the tables call it."""
        return f"{self.beat_s:.0f} s/{self.poll_s:.0f} s {'serial' if self.serial else 'parallel'}"


PACES_S = ((5.0, 5.0), (5.0, 30.0), (30.0, 30.0))
CASES = tuple(Case(beat_s, poll_s, serial) for beat_s, poll_s in PACES_S for serial in (False, True))
Sends = Callable[[float, float, Rng], list[float]]


@dataclass(slots=True)
class Found:
    """Seconds from send to hand of one kind of agent, and what they would have been at best."""

    ours: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)


def measure(bench: Bench, log: Log) -> list[Figure]:
    """Compare `poll.hold: auto` with `off` and with the bound."""
    figures: list[Figure] = []
    for part, sends, agents in ((SPARSE, _sparse, 10), (DENSE, _dense, 5), (BURSTS, _bursts, 5)):
        number = bench.pick(agents, 1)
        held, off = (simulation.run(_latencies_s(hold, number, sends)) for hold in ("auto", "off"))
        for case in CASES:
            log(f"{part}: {case.name}: {len(held[case].ours)} commands")
            for q in (50, 95):
                ours = percentile(sorted(held[case].ours), q)
                for against, values in ((OFF, off[case].ours), (BOUND, held[case].best)):
                    base = percentile(sorted(values), q)
                    ratios = (ours / base,) if base >= 0.01 else ()
                    figures.append(Figure(part, f"{case.name}, p{q}", "s", ours, base, against, ratios))
    return figures


def _sparse(started_s: float, _poll_s: float, rng: Rng) -> list[float]:
    return _at_intervals(started_s, rng, 70.0, 170.0)


def _dense(started_s: float, _poll_s: float, rng: Rng) -> list[float]:
    return _at_intervals(started_s, rng, 20.0, 32.0)


def _at_intervals(started_s: float, rng: Rng, least_s: float, most_s: float) -> list[float]:
    """Return when to send to an agent that starts now, in its first ten minutes."""
    times = [started_s + rng.uniform(1.0, most_s)]
    while times[-1] < started_s + FIRST_S:
        times.append(times[-1] + rng.uniform(least_s, most_s))
    return times[:-1]


def _bursts(started_s: float, poll_s: float, rng: Rng) -> list[float]:
    """Return when to send to an agent that was learnt before: five commands within one of its intervals, repeatedly."""
    times: list[float] = []
    for number in range(5):
        begin_s = started_s + LEARNT_S + number * 120.0 + rng.uniform(0.0, 60.0)
        times += [begin_s + each * poll_s / BURST for each in range(BURST)]
    return times


def best_s(times: list[float], started_s: float, poll_s: float) -> list[float]:
    """Return the latencies of an agent whose polls are all held as long as they may be."""
    ticker = Ticker(poll_s, started_s)
    waiting, found, free_s = list(times), [], started_s
    while waiting:
        begin_s = max(ticker.due_s, free_s)
        ticker.started(begin_s)
        taken = [at_s for at_s in waiting if at_s <= begin_s]
        if taken:
            found += [begin_s - at_s for at_s in taken]
            free_s = begin_s
        elif waiting[0] <= begin_s + MOST_HOLD_S:
            taken = waiting[:1]
            found.append(0.0)
            free_s = waiting[0]
        else:
            free_s = begin_s + MOST_HOLD_S
        waiting = waiting[len(taken) :]
    return found


async def _latencies_s(hold: str, agents: int, sends: Sends) -> dict[Case, Found]:
    """Return what was found of each kind of agent."""
    loop = asyncio.get_running_loop()
    sent_s: dict[str, float] = {}
    found = {case: Found() for case in CASES}
    rng = random.Random(5)

    def seen(case: Case) -> Callable[[Event], None]:
        def event(event: Event) -> None:
            if event.what is EventKind.COMMAND and event.command is not None:
                found[case].ours.append(event.at_s - sent_s[event.command.id])

        return event

    async def push(agent: LegacyAgent, times: list[float]) -> None:
        for at_s in times:
            await asyncio.sleep(max(0.0, at_s - loop.time()))
            command_id = f"cmd-{len(sent_s)}"
            sent_s[command_id] = loop.time()
            await world.controller.push_command(id=command_id, cluster_id=agent.cluster_id)

    async with (
        simulation.running(poll={"hold": hold, "max_hold_s": MOST_HOLD_S}) as world,
        asyncio.TaskGroup() as group,
    ):
        lives, pushes = [], []
        for case in CASES:
            for number in range(agents):
                name = f"{case.name.replace(' ', '-').replace('/', '-')}-{number}"
                who = Identity(agent_id=f"agent-{name}", cluster_name=name, token=simulation.TOKEN)
                style = PollStyle.SERIAL if case.serial else PollStyle.TICKER
                profile = AgentProfile(poll_interval_s=case.poll_s, poll_style=style, heartbeat_interval_s=case.beat_s)
                agent = LegacyAgent(world.url, who, profile, simulation.clock(), Callbacks(event=seen(case)))
                started_s = loop.time()
                times = sends(started_s, case.poll_s, rng)
                found[case].best += best_s(times, started_s, case.poll_s)
                lives.append(group.create_task(agent.run()))
                pushes.append(group.create_task(push(agent, times)))
                await asyncio.sleep(rng.uniform(0.0, 1.0))
        await asyncio.wait(pushes)
        await asyncio.sleep(60.0)
        for life in lives:
            life.cancel()
    return found
