"""`python -m tests.chaos.harness.replicas`: three replicas, PostgreSQL with a synchronous standby, one of them failing.

Replicas are killed, stopped, paused and cut off; the standby is killed; the primary is killed and restarted, cut off,
or killed for good, and then the standby is promoted and a new one made, as an operator does it.

Agents have tokens of their own and reach the replicas as through a Kubernetes Service: each connection goes to one that
is ready. The history is judged by the same checker, which also knows that two owners of a link never send at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
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

from tests.chaos.harness import events as ev
from tests.chaos.harness.agents import CAST, Part
from tests.chaos.harness.checker import Case, case, check
from tests.chaos.harness.pages import write_gateway
from tests.chaos.harness.report import distribution, machine
from tests.chaos.harness.runner import Plan, Settling, configuration
from tests.chaos.harness.supervisors import ControllerKeeper, JournalReader, KeptShim, ShimKeeper
from tests.chaos.harness.waiting import last, watch_oneself
from tests.support import network
from tests.support.cleanup_process import delete_afterwards
from tests.support.network import ManyHosts
from tests.support.postgres import BIN

TOKENS = "agent-token-"
SHIMS = ("shim-0", "shim-1", "shim-2")
SERVERS = ("db-0", "db-1")
CONTROLLER = "controller"
DATABASE_PORT = 5432
LISTEN_PORT, ADMIN_PORT = 7080, 7090
PACE = 3.0
LEASE_S = 5.0
LASTS_S, RESTS_S = (4.0, 14.0), (6.0, 12.0)
START_S = 90.0
SETTLE_S = 180.0
QUIET_S = 2.0
COMMANDS_PER_S = 6.0
CASTS = tuple(cast for cast in CAST if not cast.adopted)


class Node:
    """A PostgreSQL server on a host of its own."""

    def __init__(self, name: str, hosts: ManyHosts) -> None:
        host = hosts.hosts[name]
        self.name = name
        self.address = host.address
        self._inside = host.inside
        self.directory = Path(tempfile.mkdtemp(prefix="agent-shim-gateway-"))
        delete_afterwards(self.directory)
        self.data = self.directory / "data"
        if os.getuid() == 0:
            shutil.chown(self.directory, "postgres", "postgres")

    def run(self, program: str, *args: object, check: bool = True) -> None:
        """Run one of PostgreSQL's programs on this host, as a user that is not root."""
        as_user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups") if os.getuid() == 0 else ()
        command = [*self._inside, *as_user, str(BIN / program), *map(str, args)]
        done = subprocess.run(
            command, check=False, cwd="/", capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise AssertionError(f"{program}: {done.stdout}{done.stderr}")

    @property
    def url(self) -> str:
        """The database's URL for the replicas."""
        return f"postgresql://shim@{self.address}:{DATABASE_PORT}/postgres?sslmode=disable"

    def init(self) -> None:
        """Make an empty server that everybody on this network may use."""
        self.run("initdb", "-D", self.data, "-U", "shim", "--auth=trust", "-E", "UTF8", "--no-locale", "-N")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = '*'\nport = {DATABASE_PORT}\nunix_socket_directories = '{self.directory}'\n"
                "max_connections = 200\nmax_wal_senders = 8\nshared_buffers = 32MB\nwal_sender_timeout = 5s\n"
            )
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 trust\nhost replication all 0.0.0.0/0 trust\n")

    def copy(self, primary: Node) -> None:
        """Make it a standby of another."""
        shutil.rmtree(self.data, ignore_errors=True)
        source = f"{primary.url}&application_name={self.name}"
        self.run("pg_basebackup", "-D", self.data, "-R", "-X", "stream", "-c", "fast", "-d", source)
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"unix_socket_directories = '{self.directory}'\nsynchronous_standby_names = ''\n")

    def start(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "-t", "30", "-l", self.directory / "log", "start")

    def kill(self) -> None:
        """Kill every process of the server at once."""
        main = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        for pid in (main, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def wait_for(self, standby: Node | None) -> None:
        """Have commits wait for this standby from now on, or for none."""
        name = "" if standby is None else f'"{standby.name}"'
        for statement in (f"ALTER SYSTEM SET synchronous_standby_names = '{name}'", "SELECT pg_reload_conf()"):
            self.run("psql", "-q", "-h", self.address, "-p", DATABASE_PORT, "-U", "shim", "postgres", "-c", statement)

    def remove(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "stop", check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


class Database:
    """A primary and its synchronous standby; a failed primary is replaced as an operator does it."""

    def __init__(self, hosts: ManyHosts) -> None:
        self._nodes = [Node(name, hosts) for name in SERVERS]
        addresses = ",".join(f"{node.address}:{DATABASE_PORT}" for node in self._nodes)
        self.url = f"postgresql://shim@{addresses}/postgres?sslmode=disable"

    @property
    def primary(self) -> Node:
        return self._nodes[0]

    @property
    def standby(self) -> Node:
        return self._nodes[1]

    def start(self) -> None:
        self.primary.init()
        self.primary.start()
        self._join()

    def _join(self) -> None:
        self.standby.copy(self.primary)
        self.standby.start()
        self.primary.wait_for(self.standby)

    def promote(self) -> None:
        """The primary is gone for good: the standby takes its place, and a new standby is made."""
        self._nodes.reverse()
        self.primary.run("pg_ctl", "-D", self.primary.data, "-w", "promote")
        self._join()

    def remove(self) -> None:
        for node in self._nodes:
            node.remove()


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
        self._database = Database(hosts)
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
        config["store"] = {"url": self._database.url, "allow_insecure": True}
        config["cluster"] = {"host": host.address, "replica": name, "lease_s": LEASE_S}
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
            await asyncio.gather(self.controller.start(), asyncio.to_thread(self._database.start))
            works = [keeper.run() for keeper in self._keepers.values()]
            works += [self._service.probe(self._session), self._journal.follow(self._note), watch_oneself(self._note)]
            running += [asyncio.create_task(work) for work in works]
            async with asyncio.timeout(START_S):
                for keeper in self._keepers.values():
                    await keeper.serving.wait()
                while not await self._all_owned():
                    await last(0.2)
                agents = [asyncio.create_task(part.run()) for part in self._parts]
                running += agents
                for part in self._parts:
                    await part.connected.wait()
            pushing = asyncio.create_task(self._push_all())
            await self._trouble(duration_s)
            pushing.cancel()
            settled_s = await self._settle()
            # Agents end first: a result that is posted while the replicas end would be stored, and never reported.
            for agent in agents:
                agent.cancel()
            await asyncio.gather(*agents, return_exceptions=True)
            await self._settle()
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
            await self.controller.kill()
            await asyncio.to_thread(self._database.remove)
        self._recorder.extend(self._journal.read())
        self._recorder.close()
        return self._recorder.events, settled_s

    async def _all_owned(self) -> bool:
        """Return True if every shard has an owner among the replicas."""
        owned = wanted = 0
        for keeper in self._keepers.values():
            async with self._session.get(f"{keeper.admin}/status.json") as response:
                status = (await response.json())["replicas"]
            owned, wanted = owned + len(status["owned"]), status["shards"]
        return owned == wanted

    async def _trouble(self, duration_s: float) -> None:
        """One thing after another goes wrong, until the time is over."""
        until = time.monotonic() + duration_s
        deck: list[tuple[str, str]] = []
        while True:
            await last(self._rng.uniform(*RESTS_S))
            if not deck:
                deck = [(act, each) for act in ("kill", "cut", "pause") for each in SHIMS]
                deck += [(act, "db-primary") for act in ("restart", "promote", "promote", "cut")]
                deck += [("kill", "db-standby"), ("stop", self._rng.choice(SHIMS))]
                deck += [("drop", CONTROLLER), ("kill", CONTROLLER)]
                self._rng.shuffle(deck)
            lasts_s = self._rng.uniform(*LASTS_S)
            if time.monotonic() + lasts_s > until:
                return
            await self._injure(*deck.pop(), lasts_s)

    async def _injure(self, act: str, name: str, lasts_s: float) -> None:
        kind = name if name.startswith("db-") else name.partition("-")[0]
        with self._fault(f"{act} {kind}", name), ExitStack() as stack:
            for keeper in self._keepers.values():  # its store may be gone, or have no leader
                stack.enter_context(keeper.in_trouble())
            match act, name:
                case _, ("db-primary" | "db-standby"):
                    await self._injure_database(act, name, lasts_s)
                case "cut", _:
                    with self._hosts.cut(name):
                        await last(lasts_s)
                case "drop", _:
                    await self.controller.control("POST", "/control/faults", {"kind": "drop", "how": "rst"})
                case "kill", "controller":
                    await self.controller.end(signal.SIGKILL)
                    await last(lasts_s)
                    await self.controller.start()
                case "pause", _:
                    shim = self._keepers[name]._shim
                    with self._keepers[name].down():
                        shim.send(signal.SIGSTOP)
                        await last(lasts_s)
                        shim.send(signal.SIGCONT)
                case _:
                    keeper = self._keepers[name]
                    with keeper.down():
                        await (keeper.kill() if act == "kill" else keeper.stop())
                        await last(lasts_s)

    async def _injure_database(self, act: str, name: str, lasts_s: float) -> None:
        database = self._database
        node = database.primary if name == "db-primary" else database.standby
        if act == "cut":
            with self._hosts.cut(node.name):
                await last(lasts_s)
            return
        await asyncio.to_thread(node.kill)
        await last(lasts_s)
        await asyncio.to_thread(database.promote if act == "promote" else node.start)

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
    """Return the figures of a run."""
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
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.harness.replicas", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--seconds", type=float, help="how long; default: 150")
    parser.add_argument("--long", action="store_true", help="half an hour")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/concepts/promises.md")
    options = parser.parse_args(given)
    options.seconds = options.seconds or (1800.0 if options.long else 150.0)
    reason = network.permitted()
    if reason:
        print(f"not here: {reason}")
        return 2
    code = network.reenter("tests.chaos.harness.replicas", [*given, "--seed", str(options.seed)])
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
