"""What it costs to run: with 1 to 10,000 agents, idle and at the start (items 6 and 7)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from bench import loads, requests
from bench.controller import Send
from bench.figures import Figure, Log, compared, number
from bench.load import Found, Plan
from bench.servers import Bench, Server, end
from devtools.latency import percentile

PART = "Idle cost and start"
FEW = (1, 10, 100)  # measured at the same time
MANY = (1000, 10_000)
INTERVAL_S = 5.0
WINDOW_S = 20.0
MINUTE_S = 60.0
MINUTES = 2
STARTS = 7
COMMANDS = 200
RATE_HZ = 20.0
# A process may have 20,000 open files on many systems: with 10,000 held polls the other calls share connections.
MOST_CONNECTIONS = 5000
MB = 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """A shim with so many agents that heartbeat every 5 s and whose polls are held; then commands come for them.

    `late` heartbeats had no answer when the next one was due.
    """

    agents: int
    rss_mb: float
    cpu_percent: float
    beat_p50_ms: float
    beat_p99_ms: float
    command_p50_ms: float
    command_p99_ms: float
    late: int = 0


def measure(bench: Bench, log: Log) -> tuple[list[Figure], list[Row]]:
    """The figures of item 6, and the rows of item 7."""
    figures = [*_starts(bench, log), *_minutes(bench, log)]
    with ThreadPoolExecutor() as together:
        rows = list(together.map(lambda agents: _row(bench, agents, log), FEW))
    return figures, [*rows, *(_row(bench, agents, log) for agents in bench.pick(MANY, ()))]


def _starts(bench: Bench, log: Log) -> list[Figure]:
    controller = bench.controller()
    ours: list[float] = []
    bare: list[float] = []
    for _ in range(bench.pick(STARTS, 1)):
        for found, server in ((ours, bench.shim(controller)), (bare, bench.bare("server"))):
            found.append(server.start_s)
            end(server.process)
    log(f"start: {median(ours):.2f} s")
    note = "the store is created and synced, the admin port is open, then the agents' port"
    return [compared(PART, "from exec to serving", "s", ours, bare, against="aiohttp, same imports", note=note)]


def _minutes(bench: Bench, log: Log) -> list[Figure]:
    """CPU of a minute with one agent and with a thousand, all servers at the same time: each has its own count."""
    controller, many = bench.controller(), bench.pick(1000, 20)
    minute_s, warm_up_s = bench.pick((MINUTE_S, 2.5), (0.5, 0.2))
    spent_s: dict[tuple[int, str], list[float]] = {}
    for _ in range(bench.pick(MINUTES, 1)):
        servers: dict[tuple[int, str], Server] = {}
        with ExitStack() as running:
            for agents in (1, many):
                of_these = {"ours": bench.shim(controller), "aiohttp": bench.bare(), "naive": bench.naive(controller)}
                for name, server in of_these.items():
                    running.enter_context(loads.start(_beating(server, agents, minute_s + 2 * warm_up_s)))
                    servers[agents, name] = server
            time.sleep(warm_up_s)
            before_s = {key: server.cpu_s() for key, server in servers.items()}
            time.sleep(minute_s)
            for key, server in servers.items():
                spent_s.setdefault(key, []).append((server.cpu_s() - before_s[key]) / minute_s * MINUTE_S)
        for server in servers.values():  # after what loads them
            end(server.process)
    figures = []
    for agents in (1, many):
        what = f"CPU of a minute, {agents:,} agent{'s' if agents > 1 else ''} at 5 s"
        figures += [
            compared(PART, what, "s", spent_s[agents, "ours"], spent_s[agents, name], against=name)
            for name in ("aiohttp", "naive")
        ]
        log(f"{what}: {spent_s[agents, 'ours'][-1]:.2f} s")
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
        loads.run(_beating(server, agents, bench.pick(INTERVAL_S, 0.5)))  # everybody is known
        before_s, started_s = server.cpu_s(), time.monotonic()
        found: Found = loads.run(_beating(server, agents, bench.pick(WINDOW_S, 0.5)))
        cpu_percent = (server.cpu_s() - before_s) / (time.monotonic() - started_s) * 100
        rss_mb = server.rss_bytes() / MB
        clusters = [requests.cluster(number * agents // COMMANDS) for number in range(COMMANDS)]
        sent_s = controller.ask(Send(clusters, bench.pick(COMMANDS, 10), RATE_HZ, "sizing"))["sent"]
        time.sleep(bench.pick(3.0, 0.5))
        in_hand_s = loads.found(polls).in_hand_s
    end(server.process)
    end(controller.process)
    commands_ms = sorted((in_hand_s[command_id] - at_s) * 1e3 for command_id, at_s in sent_s.items())
    beats_ms = [each / 1e3 for each in found.latencies_us]
    log(f"{agents} agents: {rss_mb:.0f} MB, {cpu_percent:.1f} % CPU, commands p99 {percentile(commands_ms, 99):.1f} ms")
    times_ms = [percentile(each, q) for each in (beats_ms, commands_ms) for q in (50, 99)]
    return Row(agents, rss_mb, cpu_percent, times_ms[0], times_ms[1], times_ms[2], times_ms[3], found.errors)


HEAD = (
    "agents",
    "resident memory",
    "CPU of one core",
    "heartbeat p50",
    "heartbeat p99",
    "command p50",
    "command p99",
    "late",
)


def markdown(rows: list[Row]) -> list[str]:
    """The sizing table."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "--:|" * len(HEAD)]
    for row in rows:
        cells = [f"{row.agents:,}", f"{row.rss_mb:.0f} MB", f"{number(row.cpu_percent)} %"]
        times_ms = (row.beat_p50_ms, row.beat_p99_ms, row.command_p50_ms, row.command_p99_ms)
        cells += [*(f"{number(each)} ms" for each in times_ms), f"{row.late:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
