"""What it costs to run: with 1 to 10,000 agents, idle and at the start (items 6 and 7)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from bench import loads, requests
from bench.figures import Figure, Log, compared, number
from bench.load import Found, Plan
from bench.servers import Bench, Server, end
from shim.tools.latency import percentile

PART = "Idle cost and start"
FEW = (1, 10, 100)  # measured at the same time
MANY = (1000, 10_000)
INTERVAL_S = 5.0
WINDOW_S = 20.0
MINUTE_S = 60.0
STARTS = 3
# A process may have 20,000 open files on many systems: with 10,000 held polls the other calls share connections.
MOST_CONNECTIONS = 5000
MB = 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """A shim with so many agents that heartbeat every 5 s and whose polls are held."""

    agents: int
    rss_mb: float
    cpu_percent: float
    beat_p50_ms: float
    beat_p99_ms: float


def measure(bench: Bench, log: Log) -> tuple[list[Figure], list[Row]]:
    """The figures of item 6, and the rows of item 7."""
    figures = [*_starts(bench, log), *_minute(bench, log)]
    with ThreadPoolExecutor() as together:
        rows = list(together.map(lambda agents: _row(bench, agents, log), FEW))
    return figures, [*rows, *(_row(bench, agents, log) for agents in MANY)]


def _starts(bench: Bench, log: Log) -> list[Figure]:
    controller = bench.controller()
    ours: list[float] = []
    bare: list[float] = []
    for _ in range(STARTS):
        for found, server in ((ours, bench.shim(controller)), (bare, bench.bare("server"))):
            found.append(server.start_s)
            end(server.process)
    log(f"start: {median(ours):.2f} s")
    return [compared(PART, "from exec to serving", "s", ours, bare, against="aiohttp, same imports")]


def _minute(bench: Bench, log: Log) -> list[Figure]:
    """CPU of a minute with one agent and with a thousand, all four servers at the same time: each has its own count."""
    controller = bench.controller()
    figures = []
    with ExitStack() as running:
        used: dict[tuple[int, str], tuple[Server, float]] = {}
        for agents in (1, 1000):
            for name, server in (("ours", bench.shim(controller)), ("bare", bench.bare("server"))):
                running.enter_context(loads.start(_beating(server, agents, MINUTE_S + 5)))
                used[agents, name] = (server, 0.0)
        time.sleep(2.0)
        before_s = {key: server.cpu_s() for key, (server, _) in used.items()}
        time.sleep(MINUTE_S)
        spent_s = {key: server.cpu_s() - before_s[key] for key, (server, _) in used.items()}
    for agents in (1, 1000):
        ours, bare = spent_s[agents, "ours"], spent_s[agents, "bare"]
        what = f"CPU of a minute, {agents:,} agent{'s' if agents > 1 else ''} at 5 s"
        figures.append(Figure(PART, what, "s", ours, bare, "aiohttp", (ours / bare,) if bare else ()))
        log(f"{what}: {ours:.2f} s")
    return figures


def _beating(server: Server, agents: int, duration_s: float) -> Plan:
    return Plan(
        host=server.host,
        port=server.port,
        requests=[requests.heartbeat(server, number) for number in range(agents)],
        connections=min(agents, MOST_CONNECTIONS),
        mode="paced",
        duration_s=duration_s,
        interval_s=INTERVAL_S,
    )


def _row(bench: Bench, agents: int, log: Log) -> Row:
    """Agents that heartbeat and have a held poll each."""
    controller = bench.controller()
    server = bench.shim(controller, poll={"hold": 20.0}, log={"level": "warning"}, listen={"max_connections": 30_000})
    polling = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, n) for n in range(agents)],
        connections=agents,
        mode="polling",
    )
    with loads.start(polling) as polls:
        loads.held(polls)
        loads.run(_beating(server, agents, INTERVAL_S))  # everybody is known
        before_s, started_s = server.cpu_s(), time.monotonic()
        found: Found = loads.run(_beating(server, agents, WINDOW_S))
        cpu_percent = (server.cpu_s() - before_s) / (time.monotonic() - started_s) * 100
        rss_mb = server.rss_bytes() / MB
    end(server.process)
    end(controller.process)
    if found.errors:
        raise RuntimeError(f"{found.errors} heartbeats failed")
    p50, p99 = (percentile(found.latencies_us, q) / 1e3 for q in (50, 99))
    log(f"{agents} agents: {rss_mb:.0f} MB, {cpu_percent:.1f} % CPU")
    return Row(agents, rss_mb, cpu_percent, p50, p99)


def markdown(rows: list[Row]) -> list[str]:
    """The sizing table."""
    lines = ["| agents | resident memory | CPU of one core | heartbeat p50 | heartbeat p99 |", "|--:|--:|--:|--:|--:|"]
    for row in rows:
        cells = [f"{row.agents:,}", f"{row.rss_mb:.0f} MB", f"{number(row.cpu_percent)} %"]
        cells += [f"{number(row.beat_p50_ms)} ms", f"{number(row.beat_p99_ms)} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
