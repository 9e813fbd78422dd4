"""Several replicas on one PostgreSQL: ten thousand agents over three of them, and how soon one replaces another.

Each token has fifty agents, and any replica gets the calls of a third of them: two calls of three are forwarded. Agents
heartbeat every 5 s and have a poll held, as in `bench.sizing`; their polls begin spread over a hold, as those of agents
that were not all started in the same second.
"""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any

from bench import database, loads, requests
from bench.controller import Send
from bench.figures import Figure, Log, spread
from bench.load import Found, Plan
from bench.servers import CORES, Bench, Server, allow_files, end
from bench.sizing import COMMANDS, INTERVAL_S, MB, MOST_CONNECTIONS, RATE_HZ, WINDOW_S
from devtools.latency import percentile

PART = "Agents over three replicas"
CHANGES = "A replica goes, another takes over"
REPLICAS = 3
AGENTS = 10_000
AGENTS_A_TOKEN = 50
LEASE_S = 5.0  # the default
FLEET_LEASE_S = 22.0  # as in the example with CloudNativePG; one that is lost would be measured as a takeover
HOLD_S = 20.0
IN_HAND_S = 3.0
SETTLE_S = 120.0
P99_MS = 50.0
TAKEOVER_S = {"stopped": 1.0, "killed": 10.0}
ROUNDS = {"stopped": 5, "killed": 3}
OTHER_FILES = 1000
FILES_AN_AGENT = 1.2
"""Open files of a replica for each agent of the fleet: a third of the calls, and pairs to and from other replicas."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The cost of the fleet, for `bench.plan`. CPU is in percent of one core, that of `replicas` together."""

    agents: int
    replicas: int
    cpu_percent: float
    database_cpu_percent: float
    rss_mb: float
    heartbeat_p99_ms: float


def measure(bench: Bench, log: Log) -> tuple[list[Figure], Measured]:
    """The figures of both parts, and those of the fleet by themselves."""
    with database.running() as server:
        figures, measured = _fleet(bench, server, log)
        return [*figures, *_changes(bench, server.create(), log)], measured


# --- the fleet --------------------------------------------------------------------------------------------------------


def _fleet(bench: Bench, server: Any, log: Log) -> tuple[list[Figure], Measured]:
    agents = bench.pick(AGENTS, 60)
    possible = int((allow_files() - OTHER_FILES) / FILES_AN_AGENT)
    if possible < agents:
        log(f"replicas: {possible:,} agents instead of {agents:,}: there are not enough open files")
        agents = possible
    controller, url = bench.controller(), server.create()
    replicas = [_replica(bench, controller, url, FLEET_LEASE_S) for _ in range(REPLICAS)]
    _settled(replicas)
    with ExitStack() as running:
        polls = [running.enter_context(loads.start(_polls(bench, each, agents, n))) for n, each in enumerate(replicas)]
        for load in polls:
            loads.held(load)
        beating = [_beats(each, agents, n, bench.pick(INTERVAL_S, 0.5)) for n, each in enumerate(replicas)]
        _together(beating)  # everybody is known
        log(f"replicas: {agents:,} agents poll and beat")
        before_s = [*(each.cpu_s() for each in replicas), database.cpu_s(server)]
        started_s = time.monotonic()
        beats = _together([_beats(each, agents, n, bench.pick(WINDOW_S, 0.5)) for n, each in enumerate(replicas)])
        took_s = time.monotonic() - started_s
        after_s = [*(each.cpu_s() for each in replicas), database.cpu_s(server)]
        cpus = [(after - before) / took_s * 100 for before, after in zip(before_s, after_s, strict=True)]
        rss_mb = [each.rss_bytes() / MB for each in replicas]
        commands_ms = _commands_ms(bench, controller, polls, agents)
    if any('"lease_lost"' in each.log.read_text() for each in replicas):
        raise RuntimeError("a replica lost its lease: this machine is too busy to measure anything")
    for each in (*replicas, controller):  # before their database
        end(each.process)
    beats_ms = sorted(each / 1e3 for found in beats for each in found.latencies_us)
    p99_ms = percentile(beats_ms, 99)
    measured = Measured(agents, REPLICAS, sum(cpus[:-1]), cpus[-1], sum(rss_mb), p99_ms)
    log(f"replicas: heartbeat p99 {p99_ms:.1f} ms, CPU {measured.cpu_percent:.0f} %")
    late = sum(found.errors for found in beats)
    return _figures(measured, beats_ms, commands_ms, cpus, late), measured


def _figures(
    measured: Measured, beats_ms: list[float], commands_ms: list[float], cpus: list[float], late: int
) -> list[Figure]:
    of = f"{measured.agents:,} agents, "
    scaled = "" if measured.agents == AGENTS else f"{AGENTS:,} agents need more open files than are allowed here"
    each = ", ".join(f"{cpu:.1f}" for cpu in cpus[:-1])
    aim: dict[str, Any] = {"aim": P99_MS, "absolute": True}
    return [
        Figure(PART, f"{of}heartbeat p50", "ms", percentile(beats_ms, 50), note=scaled),
        Figure(PART, f"{of}heartbeat p99", "ms", measured.heartbeat_p99_ms, **aim),
        Figure(PART, f"{of}heartbeats that were late", "", late),
        Figure(PART, f"{of}command in hand p50", "ms", percentile(commands_ms, 50)),
        Figure(PART, f"{of}command in hand p99", "ms", percentile(commands_ms, 99)),
        Figure(PART, f"{of}CPU of the three replicas", "% of a core", measured.cpu_percent, note=f"each: {each}"),
        Figure(PART, f"{of}CPU of PostgreSQL", "% of a core", measured.database_cpu_percent),
        Figure(PART, f"{of}resident memory of the three replicas", "MB", measured.rss_mb),
    ]


def _replica(bench: Bench, controller: Server, url: str, lease_s: float) -> Server:
    return bench.shim(
        controller,
        set(CORES),
        store={"url": url},
        cluster={"port": 0, "lease_s": lease_s},
        upstream={"token": "", "max_links": 1000},
        poll={"hold": HOLD_S},
        listen={"max_connections": 30_000},
    )


def _settled(replicas: list[Server]) -> None:
    """Wait until these replicas have all shards, evenly."""
    until_s, owned = time.monotonic() + SETTLE_S, list[int]()
    while time.monotonic() < until_s:
        found = [each.status()["replicas"] for each in replicas]
        owned = [len(each["owned"]) for each in found]
        if sum(owned) == found[0]["shards"] and max(owned) - min(owned) <= 1:
            return
        time.sleep(0.05)
    raise RuntimeError(f"the shards did not settle: {owned}")


def _token(number: int) -> str:
    return f"tok-bench-{number // AGENTS_A_TOKEN}"


def _polls(bench: Bench, server: Server, agents: int, remainder: int) -> Plan:
    mine = range(remainder, agents, REPLICAS)
    return Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, number, token=_token(number)) for number in mine],
        connections=len(mine),
        mode="polling",
        spread_s=bench.pick(HOLD_S, 0.2),
    )


def _beats(server: Server, agents: int, remainder: int, duration_s: float) -> Plan:
    mine = range(remainder, agents, REPLICAS)
    return Plan(
        host=server.host,
        port=server.port,
        requests=[requests.heartbeat(server, number, _token(number)) for number in mine],
        connections=min(len(mine), MOST_CONNECTIONS // REPLICAS),
        mode="paced",
        duration_s=duration_s,
        interval_s=INTERVAL_S,
    )


def _together(plans: list[Plan]) -> list[Found]:
    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(loads.run, plans))


def _commands_ms(bench: Bench, controller: Server, polls: list[Any], agents: int) -> list[float]:
    """From the controller's send to the agent that has it in hand."""
    clusters = [requests.cluster(number * agents // COMMANDS) for number in range(COMMANDS)]
    sent_s = controller.ask(Send(clusters, bench.pick(COMMANDS, 10), RATE_HZ, "replicas"))["sent"]
    time.sleep(IN_HAND_S)
    in_hand_s: dict[str, float] = {}
    for each in polls:
        in_hand_s |= loads.found(each).in_hand_s
    # One that nobody had in hand at the end counts with the time for which it was waited.
    return sorted((in_hand_s.get(command_id, at_s + IN_HAND_S) - at_s) * 1e3 for command_id, at_s in sent_s.items())


# --- takeovers --------------------------------------------------------------------------------------------------------


def _changes(bench: Bench, url: str, log: Log) -> list[Figure]:
    """From the signal to the other replica's last `shard_taken`, by the time in its log."""
    controller = bench.controller()
    staying = _replica(bench, controller, url, LEASE_S)
    figures = []
    for how, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        took_s = []
        for _ in range(bench.pick(ROUNDS[how], 1)):
            leaving = _replica(bench, controller, url, LEASE_S)
            _settled([leaving, staying])
            at_s = time.time()
            leaving.process.send_signal(number)
            _settled([staying])
            leaving.process.wait()
            took_s.append(_last_taken_s(staying) - at_s)
        what = f"a replica is {how}: until another has its shards"
        note = f"{spread(took_s)}; default settings, by the log's timestamps"
        log(f"{what}: {median(took_s):.2f} s")
        aim: dict[str, Any] = {"aim": TAKEOVER_S[how], "absolute": True}
        figures.append(Figure(CHANGES, what, "s", median(took_s), note=note, **aim))
    for each in (staying, controller):
        end(each.process)
    return figures


def _last_taken_s(server: Server) -> float:
    """When a replica took its latest shard, as Unix time."""
    lines = [line for line in server.log.read_text().splitlines() if '"shard_taken"' in line]
    return datetime.fromisoformat(json.loads(lines[-1])["time"]).timestamp()
