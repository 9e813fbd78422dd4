"""One round: real processes, agents, faults by the schedule, then peace until everything is settled."""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.harness import events as ev
from tests.chaos.harness.agents import CAST, Cast, Part
from tests.chaos.harness.faults import INJURIES, Stage
from tests.chaos.harness.schedule import Planned, in_lanes
from tests.chaos.harness.supervisors import TOKEN, ControllerKeeper, JournalReader, KeptShim, ShimKeeper
from tests.chaos.harness.waiting import last, watch_oneself
from tests.support.disks import mounted
from tests.support.name_server import NameServer
from tests.support.network import Host, TwoHosts
from tests.support.processes import free_port

START_S = 30.0
SETTLE_S = 60.0
QUIET_S = 1.0
RETRY_S = 0.5
CONTROLLER_NAME = "controller.test"
RESOLVER_S = 5.0
_LAG = re.compile(rb"^agent_shim_event_loop_lag_max_seconds ([0-9.e+-]+)$", re.MULTILINE)
_ONCE = 0.15
_SHORT_LIVED = 0.1
_AGAIN = 0.05
_ODD = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of one round. Agents and the shim's time-outs are `pace` times as fast as real ones."""

    seed: int
    duration_s: float
    pace: float
    faults: Sequence[Planned]
    commands_per_s: float = 12.0
    cast: Sequence[Cast] = CAST
    acks: bool = True


@dataclass(slots=True)
class Played:
    """Result of a round."""

    plan: Plan
    history: list[ev.AnyEvent]
    counts: dict[str, int]
    rude: dict[str, int]
    nameless: frozenset[str]
    settled_s: float = 0.0
    log: list[str] = field(default_factory=list)


def configuration(plan: Plan, upstream: str) -> dict[str, Any]:
    """The shim's configuration: the defaults, faster by the pace."""
    pace = plan.pace
    return {
        "upstream": {
            "url": upstream,
            "token": TOKEN,
            "allow_insecure": True,
            "connect_timeout_s": 5 / pace,
            "ping_interval_s": 25 / pace,
            "read_timeout_s": 55 / pace,
            "heartbeat_interval_s": 27.5 / pace,
            "idle_close_s": 90 / pace,
            "reconnect": {
                "initial_s": 1 / pace,
                "max_s": 5 / pace,
                "refused_max_s": 60 / pace,
                "stable_after_s": 30 / pace,
            },
            "max_message_bytes": 1_048_576,
            "send_command_ack": plan.acks,
        },
        "register": {"deadline_s": 25 / pace},
        "listen": {"port": free_port(), "header_timeout_s": 10 / pace, "body_timeout_s": 30 / pace},
        "admin": {"port": free_port()},
        "poll": {"hold": "auto", "max_hold_s": 20 / pace, "frequency_s": 1},
        "commands": {"evidence_s": 60 / pace, "at_most_once": ["once"]},
    }


class Settling:
    """Accepted commands without an end, and results that were not reported yet."""

    def __init__(self) -> None:
        self._commands: dict[str, None] = {}
        self._results: dict[str, None] = {}
        self._done: set[str] = set()
        self._reported: set[str] = set()

    def note(self, event: ev.AnyEvent) -> None:
        match event:
            case ev.Queued(command=command) | ev.Acked(command=command):
                if command not in self._done:
                    self._commands[command] = None
            case ev.Received(command=command):
                self._done.add(command)
                self._commands.pop(command, None)
            case ev.Reported(command=command):
                self._done.add(command)
                self._reported.add(command)
                self._commands.pop(command, None)
                self._results.pop(command, None)
            case ev.Posted(command=command, status=status):
                if 200 <= status < 300 and command not in self._reported:
                    self._results[command] = None
            case ev.StoreLost():
                self._commands.clear()
                self._results.clear()
            case _:
                pass

    @property
    def owed(self) -> list[str]:
        return [*self._commands, *self._results]


class Round:
    """Sets a round up and plays it."""

    def __init__(self, plan: Plan, folder: Path, session: aiohttp.ClientSession, network: TwoHosts | None) -> None:
        self._plan = plan
        self._folder = folder
        self._session = session
        self._rng = random.Random(plan.seed)
        self._recorder = ev.Recorder(folder / "history.jsonl")
        self._settling = Settling()
        self._tasks: set[asyncio.Task[None]] = set()
        self._longest_lag_s = 0.0
        self._serial = 0
        host = network.far if network is not None else Host()
        self._controller = ControllerKeeper(folder, session, self._note, host)
        store = folder / "store"
        store.mkdir(exist_ok=True)
        self._names = NameServer(network.far.address) if network is not None else None
        url = self._controller.url
        if network is not None:  # dialled by name: a name server may hang
            url = url.replace(network.far.address, CONTROLLER_NAME)
        config = configuration(plan, url)
        config["upstream"]["gateway_hosts"] = [host.address]  # the controller's gateway has no name
        self._database = store / "agent-shim.db"
        config["store"] = {"path": str(self._database)}
        self._shim = KeptShim(folder, config)
        self._keeper = ShimKeeper(self._shim, folder / "agent-shim.yaml", self._note)
        url = f"http://127.0.0.1:{config['listen']['port']}"
        self._parts = [
            Part(cast, url, TOKEN, plan.pace, self._note, random.Random(f"{plan.seed}/{cast.name}"))
            for cast in plan.cast
        ]
        self._by_agent = {part.cast.kept_id: part.cast.name for part in self._parts if part.cast.adopted}
        self._journal = JournalReader(self._controller.journal, self._session_of)
        clock = folder / "clock"
        self._stage = Stage(
            *(self._keeper, self._controller, self._parts, self._database, plan.pace, self._note, clock),
            *(network, self._names),
        )
        self._stage.set_clock(0)

    def _note(self, event: ev.AnyEvent) -> None:
        self._recorder.add(event)
        self._settling.note(event)

    def _session_of(self, payload: dict[str, Any]) -> str:
        """The session of an upstream payload whose cluster id the controller did not hand out."""
        named = self._by_agent.get(str(payload.get("cluster_id")))
        if named:
            return named
        agent_id = str(payload.get("agent_id", ""))
        return next((part.cast.name for part in self._parts if agent_id.endswith(part.cast.name)), agent_id)

    # --- playing ------------------------------------------------------------------------------------------------------

    async def play(self) -> Played:
        plan = self._plan
        with mounted(self._database.parent):
            try:
                if self._names is not None:
                    resolver_s = max(1, round(RESOLVER_S / plan.pace))
                    await self._names.start(self._folder / "resolv.conf", resolver_s)
                await self._controller.start()
                works = (self._keeper.run(), self._journal.follow(self._note), self._watch_lag())
                running = [asyncio.create_task(work) for work in (*works, watch_oneself(self._note))]
                await self._all_connected(running)
                await self._trouble()
                settled_s = await self._settle()
                await self._part(running)
            finally:
                await self._clear()
        return Played(
            plan,
            self._recorder.events,
            self._stage.counts,
            self._rude(),
            frozenset(part.cast.name for part in self._parts if part.cast.adopted),
            settled_s,
            self._shim.lines,
        )

    async def _all_connected(self, running: list[asyncio.Task[None]]) -> None:
        """Start the agents when the shim serves, as a startup probe has it."""
        # A heartbeat every half a minute, and a rude agent spoils a third of them.
        async with asyncio.timeout(2 * START_S + 300 / self._plan.pace):
            await self._keeper.serving.wait()
            running += [asyncio.create_task(part.run()) for part in self._parts]
            for part in self._parts:
                await part.connected.wait()

    async def _trouble(self) -> None:
        """The fault phase."""
        pushing = asyncio.create_task(self._push_all())
        start = time.monotonic()
        async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
            for lane in in_lanes(self._plan.faults):
                group.create_task(self._injure(lane, start))
            await last(self._plan.duration_s)
            limit.reschedule(asyncio.get_running_loop().time() + 2 * START_S)
        pushing.cancel()
        with suppress(asyncio.CancelledError):
            await pushing
        async with asyncio.timeout(2 * START_S):
            while await self._controller.control("DELETE", "/control/faults") is None:
                await last(RETRY_S)

    async def _injure(self, lane: Sequence[Planned], start: float) -> None:
        """Each fault at its time, or as soon as the one before it is really over."""
        for planned in lane:
            await last(start + planned.at_s - time.monotonic())
            await INJURIES[planned.kind](self._stage, planned)

    async def _settle(self) -> float:
        """Peace, until nothing is owed and has not been for a moment; returns how long that took."""
        for part in self._parts:
            part.polite = True
        started = quiet = time.monotonic()
        limit_s = SETTLE_S + 300 / self._plan.pace
        while time.monotonic() - started < limit_s:
            await last(0.05)
            if self._settling.owed:
                quiet = time.monotonic()
            elif time.monotonic() - quiet > QUIET_S:
                break
        return quiet - started

    async def _part(self, running: list[asyncio.Task[None]]) -> None:
        """End everything in order."""
        for task in self._tasks:
            task.cancel()
        with self._keeper.down():
            await self._keeper.stop()
            for task in running:
                task.cancel()
            results = await asyncio.gather(*running, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        self._recorder.extend(self._journal.read())
        self._recorder.extend(stored(self._database))

    async def _clear(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_coro().__qualname__.startswith(("Part.", "ShimKeeper.", "Round.")):  # type: ignore[union-attr]
                task.cancel()
        await self._shim.kill()
        await self._controller.kill()
        if self._names is not None:
            self._names.close()
        self._recorder.close()

    # --- what goes on beside ------------------------------------------------------------------------------------------

    async def _watch_lag(self) -> None:
        """Note the shim's own measure of how long its loop was blocked, except after somebody paused it."""
        while True:
            await last(1)
            if not self._keeper.serving.is_set() or self._keeper.was_paused:
                continue
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                timeout = aiohttp.ClientTimeout(total=2)
                async with self._session.get(f"{self._keeper.admin}/metrics", timeout=timeout) as response:
                    found = _LAG.search(await response.read())
                if found is not None and float(found[1]) > self._longest_lag_s and not self._keeper.was_paused:
                    self._longest_lag_s = float(found[1])
                    self._note(ev.Lag(time.monotonic(), self._longest_lag_s))

    async def _push_all(self) -> None:
        """Commands of every kind to every session, some of them twice."""
        old: list[dict[str, Any]] = []
        while True:
            await last(self._rng.expovariate(self._plan.commands_per_s))
            if old and self._rng.random() < _AGAIN:
                spec = self._rng.choice(old)
            else:
                spec = self._command(self._rng.choice(self._parts))
                if not spec:
                    continue
                old.append(spec)
            self._begin(self._controller.push(spec))
            if self._rng.random() < _ODD:
                self._serial += 1
                part = self._rng.choice(self._parts)
                self._begin(part.post_unknown(f"{part.cast.name}.unknown-{self._serial}"))

    def _begin(self, work: Any) -> None:
        async def done() -> None:
            await work

        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _target(self, part: Part) -> dict[str, Any]:
        """Return the target by which the controller names the part; empty while it cannot."""
        if part.cast.adopted:
            return {"fields": {"cluster_id": part.cast.kept_id}}  # it never registered: no connection speaks for it
        if part.cast.dialect == "agents":
            return {"agent_id": part.agent_id}
        known = self._journal.latest_ids.get(part.cast.name)
        return {"cluster_id": known} if known else {}

    def _command(self, part: Part) -> dict[str, Any]:
        target = self._target(part)
        if not target:
            return {}
        self._serial += 1
        once = self._rng.random() < _ONCE
        spec: dict[str, Any] = {
            "id": f"{part.cast.name}.{self._serial}",
            "type": "once" if once else "work",
            "payload": {
                "n": self._serial,
                "takes_s": self._rng.choice((0, 0, 0.02, 0.2)),
                "fails": self._rng.random() < 0.1,
                "filler": "x" * self._rng.choice((0, 0, 100, 4000)),
            },
            **target,
        }
        if not part.cast.drains or self._rng.random() < _SHORT_LIVED:
            spec["ttl_seconds"] = round(self._rng.uniform(5, 60) / self._plan.pace, 3)
        return spec

    def _rude(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for part in self._parts:
            for name, times in part.rude_calls.items():
                total[name] = total.get(name, 0) + times
        return total


def stored(database: Path) -> Iterator[ev.AnyEvent]:
    """Read the shim's database after the round."""
    at = time.monotonic()
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        traces: dict[int, list[str]] = {}
        for seq, event, detail in connection.execute("SELECT command, event, detail FROM traces ORDER BY id"):
            traces.setdefault(seq, []).append(f"{event}: {detail}" if detail else event)
        for seq, command, state in connection.execute("SELECT seq, id, state FROM commands ORDER BY seq"):
            yield ev.Stored(at, command, seq, state, tuple(traces.get(seq, ())))
    finally:
        connection.close()
