"""`python -m bench.nats [--docs]`: the store on NATS JetStream, and replicas that share agents (docs/scaling.md)."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import nats

from bench import loads, machine, requests
from bench.controller import Send
from bench.figures import Figure, Log, compared, from_json, markdown, number, table
from bench.load import Plan
from bench.report import DOCS
from bench.servers import Bench, Server, end
from shim import settings
from shim.core.records import AddTrace, CommandRecord, MarkCommands, PutCommand, SessionKey, State, TraceEntry
from shim.errors import StoreError
from shim.store.jetstream import Layout, NatsStore
from shim.tools.latency import percentile
from tests.support.natsd import NatsServer, running

PART = "Commands in and out of one nats-server, on disk"
BEGIN, END = "<!-- nats: begin -->", "<!-- nats: end -->"
PAGE, DATA = DOCS / "scaling.md", DOCS / "scaling.json"
ROUNDS = 5
OUTSTANDING = {1: 200, 10: 1000, 100: 3000}
AGENTS = (100, 1000, 10_000)
REPLICAS, SHARDS, TOKENS = 3, 12, 60
LEASE_S = 20.0  # server, replicas, controller and agents share two cores here
INTERVAL_S, WINDOW_S = 10.0, 20.0
COMMANDS, RATE_HZ = 200, 20.0
KNOWN_S = 120.0
MOST_CONNECTIONS = 1000
MB = 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """Three replicas with so many agents between them; memory and CPU are those of the replica that has most.

    `late` heartbeats had no answer when the next one was due.
    """

    agents: int
    rss_mb: float
    cpu_percent: float
    nats_rss_mb: float
    nats_cpu_percent: float
    beat_p50_ms: float
    beat_p99_ms: float
    command_p50_ms: float
    command_p99_ms: float
    late: int


# --- the store --------------------------------------------------------------------------------------------------------


def store(bench: Bench, url: str, log: Log) -> list[Figure]:
    """A command is stored, and marked as delivered; against a message that is published, fetched and acknowledged."""
    figures = []
    for outstanding, all_of_them in OUTSTANDING.items():
        count, ours, plain = bench.pick(all_of_them, 100), [], []
        for round_ in range(bench.pick(ROUNDS, 1)):
            stem = f"bench-{outstanding}-{round_}"
            ours.append(_through_store(url, stem, count, outstanding))
            plain.append(asyncio.run(_through_stream(url, f"{stem}-plain", count, outstanding)))
        log(f"nats, {outstanding} outstanding: {count / ours[-1]:,.0f}/s")
        rates, plain_rates = ([count / each for each in found] for found in (ours, plain))
        against = "publish + fetch"
        figures.append(
            compared(PART, f"{outstanding} at a time", "1/s", rates, plain_rates, against=against, better="more")
        )
        if outstanding == 1:
            ours_ms, plain_ms = ([each / count * 1e3 for each in found] for found in (ours, plain))
            figures.append(compared(PART, "one, in and out", "ms", ours_ms, plain_ms, against=against))
    return figures


def _records(count: int) -> list[CommandRecord]:
    key = SessionKey("default", "cluster", requests.cluster(1))
    payload = {"replicas": 3, "deployment": "web", "namespace": "default"}
    return [
        CommandRecord(key, f"cmd-{n}", "scale", payload, "2026-11-24T21:28:03Z", 1.0, 86_401.0, f"req-{n}", 60)
        for n in range(count)
    ]


def _through_store(url: str, prefix: str, count: int, outstanding: int) -> float:
    posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
    done = 0

    def stored(record: CommandRecord, outcome: object) -> None:
        if isinstance(outcome, StoreError):
            raise outcome
        mark = MarkCommands(record.session, (record.id,), State.DELIVERED, 2.0)
        found.submit([mark], delivered)

    def delivered(outcome: object) -> None:
        nonlocal done
        if isinstance(outcome, StoreError):
            raise outcome
        done += 1
        if coming:
            submit(coming.pop())

    def submit(record: CommandRecord) -> None:
        step = AddTrace(record.session, (record.id,), TraceEntry(record.arrived_wall, "arrived", record.type))
        found.submit([PutCommand(record), step], lambda outcome: stored(record, outcome))

    found = NatsStore(settings.Store(url=url, replicas=1), posted.put, None, Layout(prefix))
    found.open()
    coming = _records(count)[::-1]
    started_s = time.perf_counter()
    for _ in range(outstanding):
        submit(coming.pop())
    while done < count:
        posted.get()()
    took_s = time.perf_counter() - started_s
    found.close()
    return took_s


async def _through_stream(url: str, name: str, count: int, outstanding: int) -> float:
    connection = await nats.connect(url)
    js = connection.jetstream()
    await js.add_stream(name=name, subjects=[f"{name}.>"], storage="file", retention="workqueue")
    waiting = await js.pull_subscribe(f"{name}.>", durable="bench")
    bodies = [msgspec.json.encode(record.payload) for record in _records(count)]

    async def publish(first: int) -> None:
        for each in range(first, count, outstanding):
            await js.publish(f"{name}.{each}", bodies[each])

    async def fetch() -> None:
        left = count
        while left:
            for message in await waiting.fetch(min(outstanding, left), timeout=10):
                await message.ack()
                left -= 1
        await connection.flush()

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        group.create_task(fetch())
        for first in range(outstanding):
            group.create_task(publish(first))
    took_s = time.perf_counter() - started_s
    await js.delete_stream(name)
    await connection.close()
    return took_s


# --- replicas ---------------------------------------------------------------------------------------------------------


def rows(bench: Bench, log: Log) -> list[Row]:
    """Replicas with more and more agents, each time new ones on a NATS server of their own."""
    return [_row(bench, agents, log) for agents in bench.pick(AGENTS, (30,))]


def _row(bench: Bench, agents: int, log: Log) -> Row:
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    server, controller = NatsServer(folder), bench.controller()
    with running(server), ExitStack() as running_loads:
        replicas = [_replica(bench, controller, server.url, f"r{n}") for n in range(REPLICAS)]
        _settled(replicas)
        beats = [_beats(replica, n, agents) for n, replica in enumerate(replicas)]
        _all_known(beats)
        log(f"{agents} agents are known")
        polls = [running_loads.enter_context(loads.start(_polls(r, n, agents))) for n, r in enumerate(replicas)]
        for each in polls:
            loads.held(each)
        time.sleep(bench.pick(INTERVAL_S, 1.0))
        measured = [*replicas, Server(server.process, "", 0, 0.0)]
        before_s, started_s = [each.cpu_s() for each in measured], time.monotonic()
        latencies_us, late = _beat(beats, bench.pick(WINDOW_S, 2.0))
        window_s = time.monotonic() - started_s
        cpu = [(each.cpu_s() - before) / window_s * 100 for each, before in zip(measured, before_s, strict=True)]
        rss = [each.rss_bytes() / MB for each in measured]
        clusters = [requests.cluster(each * agents // COMMANDS) for each in range(COMMANDS)]
        sent_s = controller.ask(Send(clusters, bench.pick(COMMANDS, 10), RATE_HZ, "nats"))["sent"]
        time.sleep(bench.pick(5.0, 1.0))
        in_hand_s: dict[str, float] = {}
        for each in polls:
            in_hand_s |= loads.found(each).in_hand_s
        for replica in replicas:
            end(replica.process)
    end(controller.process)
    commands_ms = sorted((in_hand_s[command_id] - at_s) * 1e3 for command_id, at_s in sent_s.items())
    beats_ms = sorted(each / 1e3 for each in latencies_us)
    t = [percentile(each, q) for each in (beats_ms, commands_ms) for q in (50, 99)]
    row = Row(agents, max(rss[:-1]), max(cpu[:-1]), rss[-1], cpu[-1], t[0], t[1], t[2], t[3], late)
    log(f"{agents} agents on {REPLICAS} replicas: {row.rss_mb:.0f} MB, {row.cpu_percent:.0f} %")
    return row


def _replica(bench: Bench, controller: Server, url: str, name: str) -> Server:
    return bench.shim(
        controller,
        log={"level": "warning"},
        upstream={"token": ""},
        poll={"hold": 20.0},
        store={"url": url, "replicas": 1},
        shards={"count": SHARDS, "replica": name, "lease_s": LEASE_S},
    )


def _settled(replicas: Sequence[Server]) -> None:
    """Wait until every shard has its owner."""
    until_s = time.monotonic() + KNOWN_S
    while time.monotonic() < until_s:
        owned = []
        for replica in replicas:
            with urllib.request.urlopen(f"http://{replica.ready['admin']}/status.json", timeout=10) as response:
                owned.append(len(json.load(response)["replicas"]["owned"]))
        if sum(owned) == SHARDS and max(owned) - min(owned) <= 1:
            return
        time.sleep(0.2)
    raise RuntimeError("the shards found no owners")


def _token(agent: int) -> str:
    return f"tok-{agent % TOKENS}"


def _mine(replica: int, agents: int) -> list[int]:
    """The agents that call this replica: some of each token."""
    return [agent for agent in range(agents) if (agent // TOKENS + agent) % REPLICAS == replica]


def _beats(server: Server, replica: int, agents: int) -> Plan:
    mine = _mine(replica, agents)
    return Plan(
        host=server.host,
        port=server.port,
        requests=[requests.heartbeat(server, agent, _token(agent)) for agent in mine],
        connections=min(len(mine), MOST_CONNECTIONS),
        mode="paced",
        interval_s=INTERVAL_S,
    )


def _polls(server: Server, replica: int, agents: int) -> Plan:
    mine = _mine(replica, agents)
    return Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, agent, token=_token(agent)) for agent in mine],
        connections=len(mine),
        mode="polling",
    )


def _all_known(beats: Sequence[Plan]) -> None:
    """Heartbeats until none is refused any more: each token needs a link first."""
    until_s = time.monotonic() + KNOWN_S
    while time.monotonic() < until_s:
        with ThreadPoolExecutor() as together:
            again = [msgspec.structs.replace(plan, duration_s=INTERVAL_S) for plan in beats]
            if not sum(found.errors for found in together.map(loads.run, again)):
                return
    raise RuntimeError("heartbeats are still refused")


def _beat(beats: Sequence[Plan], duration_s: float) -> tuple[list[int], int]:
    """Latencies in microseconds, and how many heartbeats had no answer in time."""
    with ThreadPoolExecutor() as together:
        again = [msgspec.structs.replace(plan, duration_s=duration_s) for plan in beats]
        found = list(together.map(loads.run, again))
    return [latency_us for each in found for latency_us in each.latencies_us], sum(each.errors for each in found)


# --- the page ---------------------------------------------------------------------------------------------------------

HEAD = (
    *("agents", "replica: memory", "CPU of one core", "nats-server: memory", "CPU of one core"),
    *("heartbeat p50", "heartbeat p99", "command p50", "command p99", "late"),
)


def lines(found: dict[str, Any]) -> list[str]:
    """What stands between the markers."""
    about = found["about"]
    shown = ["", f"- {about['machine']}; {about['system']}", f"- {about['python']}, agent-shim {about['shim']}"]
    shown[-1] += f", {about['date']}; {found['server']}"
    shown += ["", *markdown([from_json(each) for each in found["figures"]])]
    shown += [f"### {REPLICAS} replicas, {SHARDS} shards, {TOKENS} tokens", ""]
    shown += [f"| {' | '.join(HEAD)} |", "|" + "--:|" * len(HEAD)]
    for row in found["rows"]:
        cells = [f"{row['agents']:,}", f"{row['rss_mb']:.0f} MB", f"{number(row['cpu_percent'])} %"]
        cells += [f"{row['nats_rss_mb']:.0f} MB", f"{number(row['nats_cpu_percent'])} %"]
        times = ("beat_p50_ms", "beat_p99_ms", "command_p50_ms", "command_p99_ms")
        cells += [*(f"{number(row[key])} ms" for key in times), f"{row['late']:,}"]
        shown.append(f"| {' | '.join(cells)} |")
    return [*shown, ""]


def rendered(page: str, found: dict[str, Any]) -> str:
    """The page with these figures."""
    before, _, rest = page.partition(BEGIN)
    return "\n".join([before + BEGIN, *lines(found), END + rest.partition(END)[2]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nats", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a little of everything: shows that it works, no figures")
    parser.add_argument("--docs", action="store_true", help="write docs/scaling.md and the JSON beside it")
    given = parser.parse_args()
    started_s = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - started_s:6.0f} s  {line}", file=sys.stderr, flush=True)

    with Bench(quick=given.quick) as bench:
        server = NatsServer(bench.folder, name="plain")
        with running(server):
            figures = store(bench, server.url, log)
        found = {
            "about": machine.described(),
            "server": "nats-server on the same machine, one copy of each stream",
            "figures": [figure.to_json() for figure in figures],
            "rows": [asdict(row) for row in rows(bench, log)],
        }
    print("\n".join([*table(figures), *lines(found)]))
    if given.docs:
        DATA.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(rendered(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
