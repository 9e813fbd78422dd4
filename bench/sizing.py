"""The cost of running with 1 to 10,000 agents; `bench.idle` has that of an idle shim."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from bench import loads, requests
from bench.controller import Send
from bench.figures import Figure, Log, compared, number
from bench.load import Found, Plan
from bench.servers import Bench, Server, end
from devtools.latency import percentile

PART = "CPU of a thousand agents"
FEW = (1, 10, 100)  # measured at the same time
MANY = (1000, 10_000)
INTERVAL_S = 5.0
WINDOW_S = 20.0
MINUTE_S = 60.0
MINUTES = 2
COMMANDS = 200
RATE_HZ = 20.0
IN_HAND_S = 3.0
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
    wake_ups_s: float | None = None


def measure(bench: Bench, log: Log) -> tuple[list[Figure], list[Row]]:
    """Return the figures of a thousand agents, and the rows of the sizing table."""
    figures = _minutes(bench, log)
    with ThreadPoolExecutor() as together:
        rows = list(together.map(lambda agents: _row(bench, agents, log), FEW))
    return figures, [*rows, *(_row(bench, agents, log) for agents in bench.pick(MANY, ()))]


def _minutes(bench: Bench, log: Log) -> list[Figure]:
    """Count the CPU of a minute with a thousand agents, of all servers at the same time: each has its own count."""
    controller, agents = bench.controller(), bench.pick(1000, 20)
    minute_s, warm_up_s = bench.pick((MINUTE_S, 2.5), (0.5, 0.2))
    spent_s: dict[str, list[float]] = {}
    for _ in range(bench.pick(MINUTES, 1)):
        servers = {"ours": bench.shim(controller), "aiohttp": bench.bare(), "naive": bench.naive(controller)}
        with ExitStack() as running:
            for server in servers.values():
                running.enter_context(loads.start(_beating(server, agents, minute_s + 2 * warm_up_s)))
            time.sleep(warm_up_s)
            before_s = {name: server.cpu_s() for name, server in servers.items()}
            time.sleep(minute_s)
            for name, server in servers.items():
                spent_s.setdefault(name, []).append((server.cpu_s() - before_s[name]) / minute_s * MINUTE_S)
        for server in servers.values():  # after what loads them
            end(server.process)
    what = f"CPU of a minute, {agents:,} agents at 5 s"
    log(f"{what}: {spent_s['ours'][-1]:.2f} s")
    return [compared(PART, what, "s", spent_s["ours"], spent_s[name], against=name) for name in ("aiohttp", "naive")]


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
        before_s, before, started_s = server.cpu_s(), server.wake_ups(), time.monotonic()
        found: Found = loads.run(_beating(server, agents, bench.pick(WINDOW_S, 0.5)))
        passed_s = time.monotonic() - started_s
        cpu_percent = (server.cpu_s() - before_s) / passed_s * 100
        wake_ups_s = (server.wake_ups() - before) / passed_s
        rss_mb = server.rss_bytes() / MB
        clusters = [requests.cluster(number * agents // COMMANDS) for number in range(COMMANDS)]
        sent_s = controller.ask(Send(clusters, bench.pick(COMMANDS, 10), RATE_HZ, "sizing"))["sent"]
        time.sleep(IN_HAND_S)
        in_hand_s = loads.found(polls).in_hand_s
    end(server.process)
    end(controller.process)
    took_s = [in_hand_s.get(command_id, at_s + IN_HAND_S) - at_s for command_id, at_s in sent_s.items()]
    commands_ms = sorted(1e3 * each for each in took_s)
    beats_ms = [each / 1e3 for each in found.latencies_us]
    log(f"{agents} agents: {rss_mb:.0f} MB, {cpu_percent:.1f} % CPU, commands p99 {percentile(commands_ms, 99):.1f} ms")
    return Row(
        agents,
        rss_mb,
        cpu_percent,
        beat_p50_ms=percentile(beats_ms, 50),
        beat_p99_ms=percentile(beats_ms, 99),
        command_p50_ms=percentile(commands_ms, 50),
        command_p99_ms=percentile(commands_ms, 99),
        late=found.errors,
        wake_ups_s=wake_ups_s,
    )


HEAD = (
    "agents",
    "resident memory",
    "CPU of one core",
    "wake-ups a second",
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
        cells = [f"{row.agents:,}", f"{row.rss_mb:.0f} MB", f"{number(row.cpu_percent)} %", number(row.wake_ups_s)]
        times_ms = (row.beat_p50_ms, row.beat_p99_ms, row.command_p50_ms, row.command_p99_ms)
        cells += [*(f"{number(each)} ms" for each in times_ms), f"{row.late:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
