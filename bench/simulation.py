"""The real shim, the development controller and simulated agents in one process, on a clock that jumps.

Everything is the product's own code on real loopback sockets; only time is not: what the machine needs takes none of
it. So it shows what the protocol and the agents' paces cost, to the millisecond, in as many hours as one likes.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from devtools.agents import AgentProfile, Callbacks, Event, EventKind, Identity, LegacyAgent, PollStyle
from devtools.controller.server import DevController
from shim import app, log
from shim.clock import Clock
from shim.config import loader
from shim.core.records import Operation, StoreContents, StoreOperation
from shim.errors import StoreError
from shim.ports import CommandStore, StoreDone
from shim.store import CallThreadsafe, open_store
from tests.support.virtual import VirtualClock, VirtualLoop, run_virtual

_Result = TypeVar("_Result")


TOKEN = "tok-bench"  # noqa: S105
PACES = (PollStyle.TICKER, PollStyle.PAUSE)
INTERVALS_S = (5.0, 10.0, 30.0)
# Commands to one agent are far enough apart that each finds it polling again: a further one waits for the next poll.
LEAST_GAP_S, MOST_GAP_S = 70.0, 190.0

Kind = tuple[str, float]
T = TypeVar("T")


class _Counted:
    """A `ports.CommandStore` that knows what is outstanding, so that time stands still meanwhile."""

    def __init__(self, inner: CommandStore) -> None:
        self._inner = inner
        self.outstanding = 0

    def open(self) -> StoreContents:
        try:
            return self._inner.open()
        finally:
            self.outstanding -= 1

    def submit(
        self, operation: StoreOperation[_Result], *also: Operation, done: StoreDone[_Result] | None = None
    ) -> None:
        self.outstanding += 1

        def told(outcome: _Result | StoreError) -> None:
            self.outstanding -= 1
            if done is not None:
                done(outcome)

        self._inner.submit(operation, *also, done=told)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self.outstanding -= 1


class _VirtualApp(app.App):
    """The shim with its clock and store in virtual time."""

    counted: _Counted

    def make_clock(self) -> Clock:
        made: Clock = clock()
        return made

    def make_store(self, post: CallThreadsafe) -> CommandStore:
        store = _Counted(open_store(self.settings.store, post))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.outside = lambda: store.outstanding > 0
        store.outstanding += 1  # until it is open
        self.counted = store
        return store


def clock() -> Any:
    """Return the clock of the running virtual loop."""
    return VirtualClock(asyncio.get_running_loop())


@dataclass(slots=True)
class World:
    """A running shim and its controller."""

    shim: app.App
    controller: DevController
    url: str


@asynccontextmanager
async def _directly(url: str) -> AsyncIterator[str]:
    yield url


@asynccontextmanager
async def running(
    between: Callable[[str], AbstractAsyncContextManager[str]] = _directly, **sections: dict[str, Any]
) -> AsyncIterator[World]:
    """A shim with these sections over what is needed; `between` may put something between it and the controller."""
    with tempfile.TemporaryDirectory(prefix="agent-shim-bench-") as folder:
        async with DevController([TOKEN], clock=clock()) as controller, between(controller.url) as url:
            values: dict[str, dict[str, Any]] = {
                "listen": {"port": 0},
                "admin": {"port": 0},
                "log": {"level": "error"},
                "upstream": {"url": url, "token": TOKEN},
                "store": {"path": str(Path(folder) / "agent-shim.db")},
            }
            for name, given in sections.items():
                values[name] = {**values.get(name, {}), **given}
            sets = tuple(f"{name}.{key}={value}" for name, keys in values.items() for key, value in keys.items())
            settings = loader.load(None, {}, sets)
            with closing(log.setup("error", "json")) as logs:
                shim = _VirtualApp(settings, lambda: settings, logs)
                task = asyncio.create_task(shim.run())
                await shim.ready.wait()
                yield World(shim, controller, f"http://{shim.addresses['listen']}")
                shim.counted.outstanding += 1  # until it is closed
                shim.stop_requested.set()
                await task


def run(simulation: Coroutine[Any, Any, T]) -> T:
    """Run a simulation in virtual time."""

    async def wound_up() -> T:
        try:
            return await simulation
        finally:
            # What is left to come is the end of threads.
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.outside = lambda: True

    return run_virtual(wound_up())


@dataclass(frozen=True, slots=True)
class Span:
    """The agents of each kind, the time for which they live, and the time for which they were learnt before."""

    agents_per_kind: int = 6
    warm_up_s: float = 900.0
    measured_s: float = 3600.0


def latencies_s(hold: str, span: Span) -> dict[Kind, list[float]]:
    """Seconds from send to hand by the agents' pace and interval, after they were learnt."""
    return run(_latencies_s(hold, span))


async def _latencies_s(hold: str, span: Span) -> dict[Kind, list[float]]:
    loop = asyncio.get_running_loop()
    sent_s: dict[str, float] = {}
    found: dict[Kind, list[float]] = {}
    rng = random.Random(4)

    def seen(kind: Kind) -> Callable[[Event], None]:
        def event(event: Event) -> None:
            if event.what is EventKind.COMMAND and event.command is not None:
                found.setdefault(kind, []).append(event.at_s - sent_s[event.command.id])

        return event

    async def push(agent: LegacyAgent) -> None:
        end_s = loop.time() + span.warm_up_s + span.measured_s
        await asyncio.sleep(span.warm_up_s)
        while loop.time() < end_s:
            await asyncio.sleep(rng.uniform(LEAST_GAP_S, MOST_GAP_S))
            command_id = f"cmd-{len(sent_s)}"
            sent_s[command_id] = loop.time()
            await world.controller.push_command(id=command_id, cluster_id=agent.cluster_id)

    async with running(poll={"hold": hold}) as world, asyncio.TaskGroup() as group:
        lives, pushes = [], []
        for pace in PACES:
            for interval_s in INTERVALS_S:
                for number in range(span.agents_per_kind):
                    name = f"{pace.value}-{interval_s:.0f}-{number}"
                    who = Identity(agent_id=f"agent-{name}", cluster_name=name, token=TOKEN)
                    profile = AgentProfile(poll_interval_s=interval_s, poll_style=pace, heartbeat_interval_s=30.0)
                    callbacks = Callbacks(event=seen((pace.value, interval_s)))
                    agent = LegacyAgent(world.url, who, profile, clock(), callbacks)
                    lives.append(group.create_task(agent.run()))
                    pushes.append(group.create_task(push(agent)))
                    await asyncio.sleep(rng.uniform(0.0, 1.0))
        await asyncio.wait(pushes)
        await asyncio.sleep(60.0)
        for life in lives:
            life.cancel()
    return found
