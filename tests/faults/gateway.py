"""`python -m tests.faults.gateway`: three replicas, three NATS servers, any one of the six killed or cut off at a time.

Agents have tokens of their own and reach the replicas as through a Kubernetes Service: each connection goes to one that
is ready. The history is judged by the same checker, which also knows that two owners of a link never send at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from tests.faults import events as ev
from tests.faults.agents import CAST, Part
from tests.faults.checker import LOOK_S, Case, case, check
from tests.faults.harness import LATE_S, Plan, Settling, configuration
from tests.faults.keepers import ControllerKeeper, JournalReader, KeptShim, ShimKeeper
from tests.faults.pages import write_gateway
from tests.faults.report import distribution, machine
from tests.faults.waiting import last
from tests.support import network
from tests.support.network import ManyHosts
from tests.support.processes import _Child

TOKENS = "agent-token-"
SHIMS = ("shim-0", "shim-1", "shim-2")
SERVERS = ("nats-0", "nats-1", "nats-2")
CONTROLLER = "controller"
CLIENTS_PORT, ROUTES_PORT = 4222, 6222
LISTEN_PORT, ADMIN_PORT = 7080, 7090
PACE = 3.0
LEASE_S = 2.0
LASTS_S, RESTS_S = (4.0, 14.0), (6.0, 12.0)
START_S = 90.0
SETTLE_S = 180.0
QUIET_S = 2.0
COMMANDS_PER_S = 6.0
CASTS = tuple(cast for cast in CAST if not cast.adopted)


class NatsNode(_Child):
    """One server of the cluster on a host of its own."""

    def __init__(self, name: str, folder: Path, hosts: ManyHosts) -> None:
        super().__init__()
        host = hosts.hosts[name]
        routes = ", ".join(f'"nats://{hosts.hosts[each].address}:{ROUTES_PORT}"' for each in SERVERS)
        config = folder / f"{name}.conf"
        config.write_text(
            f"server_name: {name}\nhost: {host.address}\nport: {CLIENTS_PORT}\n"
            f'jetstream {{store_dir: "{folder / name}"}}\n'
            f"cluster {{name: c, host: {host.address}, port: {ROUTES_PORT}, routes: [{routes}]}}\n"
        )
        self.program = (*host.inside, "nats-server")
        self._args = ("-c", str(config))

    async def start(self) -> None:
        """Start it and wait until it takes clients."""
        after = len(self.lines)
        await self._spawn(*self._args)
        await self._line(lambda line: "Server is ready" in line, after)


class Service:
    """Chooses a replica for each connection, of those whose readiness probe succeeded last."""

    def __init__(self, addresses: dict[str, str], rng: random.Random) -> None:
        self._addresses = addresses
        self._rng = rng
        self.ready: set[str] = set()

    def __call__(self) -> str:
        """The URL of one."""
        return f"http://{self._addresses[self._rng.choice(sorted(self.ready or self._addresses))]}:{LISTEN_PORT}"

    async def probe(self, session: aiohttp.ClientSession) -> None:
        """Look at all replicas, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name in self._addresses:
                group.create_task(self._probe(session, name))

    async def _probe(self, session: aiohttp.ClientSession, name: str) -> None:
        url = f"http://{self._addresses[name]}:{ADMIN_PORT}/readyz"
        timeout = aiohttp.ClientTimeout(total=1)
        while True:
            ready = False
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.get(url, timeout=timeout) as response:
                    ready = response.status == 200
            (self.ready.add if ready else self.ready.discard)(name)
            await last(0.5)


class Replicas:
    """The whole gateway on its hosts."""

    def __init__(self, seed: int, folder: Path, session: aiohttp.ClientSession, hosts: ManyHosts) -> None:
        self._folder = folder
        self._session = session
        self._hosts = hosts
        self._rng = random.Random(seed)
        self._recorder = ev.Recorder(folder / "history.jsonl")
        self._settling = Settling()
        self._serial = 0
        self.counts: Counter[str] = Counter()
        self.controller = ControllerKeeper(folder, session, self._note, hosts.hosts[CONTROLLER])
        self.controller._args += ("--token-prefix", TOKENS)
        self._nodes = {name: NatsNode(name, folder, hosts) for name in SERVERS}
        self._keepers = {name: self._keeper(name) for name in SHIMS}
        addresses = {name: hosts.hosts[name].address for name in SHIMS}
        self._service = Service(addresses, random.Random(f"{seed}/service"))
        self._parts = [self._part(cast, seed) for cast in CASTS]
        self._journal = JournalReader(self.controller.journal, self._session_of, owners=True)

    def _keeper(self, name: str) -> ShimKeeper:
        folder = self._folder / name
        folder.mkdir()
        host = self._hosts.hosts[name]
        config = configuration(Plan(0, 0, PACE, ()), self.controller.url)
        del config["upstream"]["token"]
        config["listen"] |= {"host": host.address, "port": LISTEN_PORT}
        config["admin"] |= {"host": host.address, "port": ADMIN_PORT}
        servers = ",".join(f"nats://{self._hosts.hosts[each].address}:{CLIENTS_PORT}" for each in SERVERS)
        config["store"] = {"url": servers, "replicas": 3}
        config["shards"] = {"count": 8, "replica": name, "lease_s": LEASE_S}
        shim = KeptShim(folder, config)
        return ShimKeeper(shim, folder / "agent-shim.yaml", self._note, host.inside)

    def _part(self, cast: Any, seed: int) -> Part:
        token = f"{TOKENS}{cast.name}"
        part = Part(cast, self._service(), token, PACE, self._note, random.Random(f"{seed}/{cast.name}"))
        part.where = self._service
        return part

    def _note(self, event: ev.AnyEvent) -> None:
        self._recorder.add(event)
        self._settling.note(event)

    def _session_of(self, payload: dict[str, Any]) -> str:
        agent_id = str(payload.get("agent_id", ""))
        return next((part.cast.name for part in self._parts if agent_id.endswith(part.cast.name)), agent_id)

    # --- playing ------------------------------------------------------------------------------------------------------

    async def play(self, duration_s: float) -> tuple[list[ev.AnyEvent], float]:
        """The history, and how long settling took."""
        running: list[asyncio.Task[None]] = []
        ending = ExitStack()  # nobody is started again
        try:
            await asyncio.gather(self.controller.start(), *(node.start() for node in self._nodes.values()))
            works = [keeper.run() for keeper in self._keepers.values()]
            works += [self._service.probe(self._session), self._read_journal(), self._watch_oneself()]
            running += [asyncio.create_task(work) for work in works]
            async with asyncio.timeout(START_S):
                for keeper in self._keepers.values():
                    await keeper.serving.wait()
                while not await self._all_owned():
                    await last(0.2)
                running += [asyncio.create_task(part.run()) for part in self._parts]
                for part in self._parts:
                    await part.connected.wait()
            pushing = asyncio.create_task(self._push_all())
            await self._trouble(duration_s)
            pushing.cancel()
            settled_s = await self._settle()
            for keeper in self._keepers.values():
                ending.enter_context(keeper.down())
                await keeper.stop()
        finally:
            for name, keeper in self._keepers.items():
                ending.enter_context(keeper.down())
                await keeper._shim.kill()
                (self._folder / f"{name}.log").write_text("\n".join(keeper._shim.lines))
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            ending.close()
            for child in (self.controller, *self._nodes.values()):
                await child.kill()
        self._recorder.extend(self._journal.read())
        self._recorder.close()
        return self._recorder.events, settled_s

    async def _all_owned(self) -> bool:
        """Whether the replicas have all shards between them."""
        owned = wanted = 0
        for keeper in self._keepers.values():
            async with self._session.get(f"{keeper.admin}/status.json") as response:
                status = (await response.json())["replicas"]
            owned, wanted = owned + len(status["owned"]), status["shards"]
        return owned == wanted

    async def _trouble(self, duration_s: float) -> None:
        """One of the six after another, until the time is over."""
        until = time.monotonic() + duration_s
        deck: list[tuple[str, str]] = []
        while True:
            await last(self._rng.uniform(*RESTS_S))
            if not deck:
                deck = [("kill", each) for each in (*SHIMS, *SERVERS)] + [("cut", each) for each in (*SHIMS, *SERVERS)]
                deck += [("stop", self._rng.choice(SHIMS)), ("drop", CONTROLLER), ("kill", CONTROLLER)]
                self._rng.shuffle(deck)
            lasts_s = self._rng.uniform(*LASTS_S)
            if time.monotonic() + lasts_s > until:
                return
            await self._injure(*deck.pop(), lasts_s)

    async def _injure(self, act: str, name: str, lasts_s: float) -> None:
        kind = name.partition("-")[0]
        with self._fault(f"{act} {kind}", name), ExitStack() as stack:
            for keeper in self._keepers.values():  # its store may be gone, or have no leader
                stack.enter_context(keeper.in_trouble())
            match act, name:
                case "cut", _:
                    with self._hosts.cut(name):
                        await last(lasts_s)
                case "drop", _:
                    await self.controller.control("POST", "/control/faults", {"kind": "drop", "how": "rst"})
                case "kill", "controller":
                    await self.controller.end(signal.SIGKILL)
                    await last(lasts_s)
                    await self.controller.start()
                case "kill", _ if name in self._nodes:
                    await self._nodes[name].kill()
                    await last(lasts_s)
                    await self._nodes[name].start()
                case _:
                    keeper = self._keepers[name]
                    with keeper.down():
                        await (keeper.kill() if act == "kill" else keeper.stop())
                        await last(lasts_s)

    @contextmanager
    def _fault(self, name: str, detail: str) -> Iterator[None]:
        self.counts[name] += 1
        self._note(ev.Fault(time.monotonic(), name, begins=True, detail=detail))
        try:
            yield
        finally:
            self._note(ev.Fault(time.monotonic(), name, begins=False))

    async def _settle(self) -> float:
        for part in self._parts:
            part.polite = True
        started = quiet = time.monotonic()
        while time.monotonic() - started < SETTLE_S:
            await last(0.1)
            if self._settling.owed:
                quiet = time.monotonic()
            elif time.monotonic() - quiet > QUIET_S:
                break
        return quiet - started

    # --- what goes on beside ------------------------------------------------------------------------------------------

    async def _read_journal(self) -> None:
        while True:
            for event in self._journal.read():
                self._note(event)
            await last(0.1)

    async def _watch_oneself(self) -> None:
        while True:
            due = time.monotonic() + LOOK_S
            await last(LOOK_S)
            late_s = time.monotonic() - due
            if late_s > LATE_S:
                self._note(ev.Late(time.monotonic(), late_s))

    async def _push_all(self) -> None:
        while True:
            await last(self._rng.expovariate(COMMANDS_PER_S))
            part = self._rng.choice(self._parts)
            cluster_id = self._journal.latest_ids.get(part.cast.name)
            if not cluster_id:
                continue
            self._serial += 1
            spec: dict[str, Any] = {
                "id": f"{part.cast.name}.{self._serial}",
                "type": "once" if self._rng.random() < 0.15 else "work",
                "payload": {"n": self._serial, "takes_s": self._rng.choice((0, 0.02)), "filler": "x" * 100},
            }
            spec |= {"agent_id": part.agent_id} if part.cast.dialect == "agents" else {"cluster_id": cluster_id}
            if not part.cast.drains:
                spec["ttl_seconds"] = round(self._rng.uniform(5, 20), 3)
            await self.controller.push(spec)


def figures(
    options: argparse.Namespace, history: Sequence[ev.AnyEvent], counts: Counter[str], settled_s: float
) -> dict[str, Any]:
    """What a run came to."""
    found: Case = case(history)
    commands = list(found.commands.values())
    stops = [event.seconds for event in history if isinstance(event, ev.Stopped)]
    return {
        "machine": machine(),
        "seed": options.seed,
        "duration_s": options.seconds,
        "settled_s": round(settled_s, 1),
        "faults": dict(sorted(counts.items())),
        "commands": {
            "pushed": sum(1 for command in commands if command.pushed),
            "accepted": sum(1 for command in commands if command.accepted_at is not None),
            "received": sum(1 for command in commands if command.received),
            "received_more_than_once": sum(1 for command in commands if len(command.received) > 1),
            "results_taken": sum(1 for c in commands if any(200 <= post.status < 300 for post in c.posted)),
            "ended_by_code": dict(sorted(Counter(r.code for c in commands for r in c.reported if r.code).items())),
        },
        "heartbeats_upstream": len(found.of(ev.Beat)),
        "stops": distribution(stops),
        "violations": [asdict(violation) for violation in check(found)],
    }


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.gateway", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--seconds", type=float, help="how long; default: 150")
    parser.add_argument("--long", action="store_true", help="half an hour")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/reliability.md")
    options = parser.parse_args(given)
    options.seconds = options.seconds or (1800.0 if options.long else 150.0)
    reason = network.permitted()
    if reason:
        print(f"not here: {reason}")
        return 2
    code = network.reenter("tests.faults.gateway", [*given, "--seed", str(options.seed)])
    if code is not None:
        return code
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(_play(options, folder))
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.docs:
        write_gateway(found)
    return 1 if found["violations"] else 0


async def _play(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    hosts = ManyHosts(*SHIMS, *SERVERS, CONTROLLER)
    async with aiohttp.ClientSession() as session:
        gateway = Replicas(options.seed, folder, session, hosts)
        history, settled_s = await gateway.play(options.seconds)
    return figures(options, history, gateway.counts, settled_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
