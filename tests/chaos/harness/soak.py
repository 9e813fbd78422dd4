"""`python -m tests.chaos.harness.soak`: ten million calls on one shim, with memory, files and the loop's lag over time.

Agents in another process call as fast as they are answered: heartbeats, polls, and results of the commands that the
development controller pushes all the while. Nothing fails on purpose. In the end every command that was acknowledged
has reached its agent and its result the controller, and the log has no error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from devtools.agents import AgentProfile, Callbacks, Command, Identity, LegacyAgent, Result
from shim.clock import Clock
from tests.chaos.harness import events as ev
from tests.chaos.harness.pages import write_soak
from tests.chaos.harness.report import machine
from tests.chaos.harness.soak_agents import Found, Plan
from tests.chaos.harness.supervisors import JournalReader
from tests.chaos.harness.waiting import last, waited_for_cpu_s
from tests.support.processes import TOKEN, Controller, Shim

CALLS = 10_000_000
AGENTS = 48
BATCH = 8
PUSHES_PER_S = 6.0
AT_ONCE = 5
SAMPLE_S = 5.0
RETAIN_S = 300
SETTLE_S = 120.0
_SUM = re.compile(r"^agent_shim_event_loop_lag_seconds_sum (\S+)$", re.MULTILINE)
_COUNT = re.compile(r"^agent_shim_event_loop_lag_seconds_count (\S+)$", re.MULTILINE)
_LONGEST = re.compile(r"^agent_shim_event_loop_lag_max_seconds (\S+)$", re.MULTILINE)


class Sample(msgspec.Struct):
    """The shim at one moment. `lag_ms` is the mean delay of the event loop since the sample before.

    `waited_percent` is the share of that time in which the loop was ready to run and had no processor.
    """

    at_s: float
    calls: int
    rss_mib: float
    pss_mib: float
    files: int
    wal_mib: float
    database_mib: float
    lag_ms: float
    waited_percent: float


class Ledger:
    """Commands by what the controller knows of them."""

    def __init__(self, journal: Path) -> None:
        self._reader = JournalReader(journal, lambda payload: "")
        self.pushed: set[str] = set()
        self.acked: set[str] = set()
        self.reported: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    def read(self) -> None:
        """Take in what the controller has written since the last time."""
        for event in self._reader.read():
            match event:
                case ev.Pushed(command=command):
                    self.pushed.add(command)
                case ev.Acked(command=command):
                    self.acked.add(command)
                case ev.Reported(command=command, code=code):
                    self.reported[command] += 1
                    if code:
                        self.codes[code] += 1

    @property
    def owed(self) -> int:
        return len(self.pushed - self.reported.keys())


class Watch:
    """Everything that is measured of the shim's process, and what its log says."""

    def __init__(self, shim: Shim, database: Path, session: aiohttp.ClientSession) -> None:
        self._shim = shim
        self._database = database
        self._session = session
        self._began = time.monotonic()
        self._lag = (0.0, 0.0)
        self._waited_s = waited_for_cpu_s(shim.pid)
        self.waited_s = 0.0
        self.longest_lag_s = 0.0
        self.samples: list[Sample] = []
        self.events: Counter[str] = Counter()
        self.unexplained: list[str] = []
        shim.on_line = self._on_line

    def _on_line(self, line: str) -> None:
        entry: dict[str, Any] = {}
        with suppress(ValueError):
            entry = json.loads(line)
        self.events[entry.get("event", "")] += 1
        if not entry or entry["level"] in ("error", "critical") or "exception" in entry:
            self.unexplained.append(line[:1000])
        self._shim.lines.clear()  # a million lines

    async def sample(self, calls: int) -> Sample:
        """Take one sample."""
        process = Path(f"/proc/{self._shim.pid}")
        async with self._session.get(f"{self._shim.admin}/metrics") as response:
            text = await response.text()
        total_s, count = (float(found[1]) for pattern in (_SUM, _COUNT) if (found := pattern.search(text)))
        longest = _LONGEST.search(text)
        self.longest_lag_s = float(longest[1]) if longest else 0.0
        measured = max(1.0, count - self._lag[1])
        waited_s, at_s = waited_for_cpu_s(self._shim.pid), time.monotonic() - self._began
        since_s = at_s - (self.samples[-1].at_s if self.samples else 0.0)
        taken = Sample(
            round(at_s, 1),
            calls,
            *(round(_kib(process, key) / 1024, 1) for key in ("Rss", "Pss")),
            len(list((process / "fd").iterdir())),
            *(round(_size_bytes(self._database, suffix) / 2**20, 2) for suffix in ("-wal", "")),
            round((total_s - self._lag[0]) / measured * 1e3, 2),
            round(100 * (waited_s - self._waited_s) / since_s, 1),
        )
        self.waited_s += waited_s - self._waited_s
        self._lag, self._waited_s = (total_s, count), waited_s
        self.samples.append(taken)
        return taken


def _kib(process: Path, key: str) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"the kernel does not tell {key}")


def _size_bytes(database: Path, suffix: str) -> int:
    path = database.with_name(database.name + suffix)
    return path.stat().st_size if path.exists() else 0


async def _register(shim: Shim) -> list[str]:
    """Register the agents, and return the cluster ids that they got."""

    async def execute(command: Command) -> Result:
        raise AssertionError(command.id)

    async def one(number: int) -> str:
        name = f"soak-{number}"
        callbacks = Callbacks(event=lambda event: None, execute=execute)
        who = Identity(agent_id=name, cluster_name=name, token=TOKEN)
        agent = LegacyAgent(shim.url, who, AgentProfile(), Clock(), callbacks)
        assert await agent.register()
        agent.close()
        return agent.cluster_id

    return list(await asyncio.gather(*map(one, range(AGENTS))))


async def _push(controller: Controller, clusters: list[str], rng: random.Random) -> None:
    """Push commands until cancelled."""
    while True:
        await last(rng.expovariate(PUSHES_PER_S))
        spec = {"type": "work", "cluster_id": rng.choice(clusters), "count": AT_ONCE, "payload": {"x": "y" * 200}}
        await controller.control("POST", "/control/commands", spec)


class Run:
    """One soak."""

    def __init__(self, calls: int, seed: int, limit_s: float = math.inf) -> None:
        """End after so many calls, or after `limit_s` seconds if that comes first."""
        self._target = calls
        self._limit_s = limit_s
        self._rng = random.Random(seed)
        self._calls = 0
        self._last_line = b""

    async def play(self, folder: Path) -> dict[str, Any]:
        """Play it, and return its figures."""
        journal, database = folder / "journal", folder / "agent-shim.db"
        async with (
            aiohttp.ClientSession() as session,
            Controller(folder, session, "--journal", str(journal)) as controller,
        ):
            await controller.start()
            config = {
                "upstream": {"url": controller.url, "token": TOKEN, "allow_insecure": True, "send_command_ack": True},
                "poll": {"hold": "off"},
                "commands": {"retain_s": RETAIN_S, "dedupe_s": RETAIN_S},
                "store": {"path": str(database)},
            }
            async with Shim(folder, config) as shim:
                await shim.start()
                clusters = await _register(shim)
                watch, ledger = Watch(shim, database, session), Ledger(journal)
                began = time.monotonic()
                found = await self._load(shim, controller, clusters, watch, ledger)
                took_s = time.monotonic() - began
                assert await shim.stop() == 0
        ledger.read()
        return self._figures(found, ledger, watch, took_s)

    async def _load(
        self, shim: Shim, controller: Controller, clusters: list[str], watch: Watch, ledger: Ledger
    ) -> Found:
        host, _, port = shim.url.removeprefix("http://").rpartition(":")
        plan = Plan(host=host, port=int(port), token=TOKEN, clusters=clusters, batch=BATCH)
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "tests.chaos.harness.soak_agents")
        agents = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**28)
        assert agents.stdin is not None
        agents.stdin.write(msgspec.json.encode(plan) + b"\n")
        reading = asyncio.create_task(self._follow(agents))
        pushing = asyncio.create_task(_push(controller, clusters, self._rng))
        try:
            until_s = time.monotonic() + self._limit_s
            while self._calls < self._target and not reading.done() and time.monotonic() < until_s:
                await last(SAMPLE_S)
                taken = await watch.sample(self._calls)
                ledger.read()
                if len(watch.samples) % 12 == 1:
                    print(msgspec.json.encode(taken).decode(), flush=True)
            pushing.cancel()
            until = time.monotonic() + SETTLE_S
            while time.monotonic() < until:
                await last(1)
                ledger.read()
                if not ledger.owed:
                    break
            agents.stdin.close()
            await reading
        finally:
            pushing.cancel()
            if agents.returncode is None:
                agents.terminate()
            await agents.wait()
        return msgspec.json.decode(self._last_line, type=Found)

    async def _follow(self, agents: asyncio.subprocess.Process) -> None:
        """Read how many calls the agents have made, until they end."""
        assert agents.stdout is not None
        async for line in agents.stdout:
            self._last_line = line
            if line[:1] != b"{":
                self._calls = int(line)

    def _figures(self, found: Found, ledger: Ledger, watch: Watch, took_s: float) -> dict[str, Any]:
        lost = [each for each in ledger.acked if each not in found.received and each not in ledger.reported]
        unreported = [each for each in found.taken if each not in ledger.reported]
        return {
            "machine": machine(),
            "duration_s": round(took_s),
            "agents": AGENTS,
            "batch": BATCH,
            "calls": found.calls,
            "refused": found.refused,
            "commands": {
                "pushed": len(ledger.pushed),
                "acked": len(ledger.acked),
                "received": len(found.received),
                "received_more_than_once": sum(1 for times in found.received.values() if times > 1),
                "ended_by_code": dict(sorted(ledger.codes.items())),
                "lost": len(lost),
                "results_taken": len(found.taken),
                "results_lost": len(unreported),
            },
            "log": {"lines": sum(watch.events.values()), "unexplained": watch.unexplained[:20]},
            "longest_lag_s": round(watch.longest_lag_s, 3),
            "waited_for_processor_s": round(watch.waited_s),
            "samples": msgspec.to_builtins(watch.samples),
        }


def broken(found: dict[str, Any]) -> bool:
    """Return whether a promise was broken."""
    commands, log = found["commands"], found["log"]
    return bool(commands["lost"] or commands["results_lost"] or log["unexplained"] or found["refused"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.harness.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end then, however many calls there were")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--json", type=Path, default=Path("build/soak.json"))
    parser.add_argument("--docs", action="store_true", help="put figures and plot into docs/concepts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.calls, options.seed, options.minutes * 60)
        found = {"seed": options.seed} | asyncio.run(run.play(Path(folder)))
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=1))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found) + "\n")
    if options.docs:
        write_soak(found)
    return 1 if broken(found) else 0


if __name__ == "__main__":
    sys.exit(main())
