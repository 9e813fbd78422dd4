"""The cost of a shim with little or nothing to do: wake-ups, CPU, memory and start, from a wheel with bytecode."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

from bench import libraries, loads, requests
from bench.figures import Figure, Log, compared, spread
from bench.libraries import Library
from bench.load import Plan
from bench.servers import Bench, Server, end

PART = "Idle cost and start"
STARTS = 15
SETTLE_S = 1.5
MINUTES = 3
MINUTE_S = 60.0
WARM_UP_S = 10.0
INTERVAL_S = 5.0
HOLD_S = 20.0
MB = 1e6
BARE = "aiohttp, same imports"


def measure(bench: Bench, log: Log) -> tuple[list[Figure], list[Library]]:
    """Measure starts and memory in alternating rounds, then minutes of all servers at the same time, then imports."""
    bench.install()
    controller = bench.controller()
    figures = [*_starts(bench, controller, log), *_minutes(bench, controller, log)]
    return figures, libraries.measure(bench)


def _starts(bench: Bench, controller: Server, log: Log) -> list[Figure]:
    """Start fresh processes in turn; after a moment, online and without agents, look at their memory."""
    names = ("ours", "bare")
    start_s: dict[str, list[float]] = {name: [] for name in names}
    rss_mb: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(bench.pick(STARTS, 1)):
        for name in names:
            server = bench.shim(controller) if name == "ours" else bench.bare()
            start_s[name].append(server.start_s)
            time.sleep(bench.pick(SETTLE_S, 0.0))
            rss_mb[name].append(server.rss_bytes() / MB)
            end(server.process)
    log(f"start: {median(start_s['ours']):.2f} s, idle: {median(rss_mb['ours']):.1f} MB")
    note = "the store is created and synced, the admin port is open, then the agents' port"
    return [
        compared(
            PART, "from exec to serving", "s", start_s["ours"], start_s["bare"], against=BARE, aim=1.25, note=note
        ),
        compared(PART, "idle RSS", "MB", rss_mb["ours"], rss_mb["bare"], against=BARE, aim=1.1),
        Figure(PART, "idle RSS, absolute", "MB", max(rss_mb["ours"]), aim=48.0, absolute=True),
    ]


def _minutes(bench: Bench, controller: Server, log: Log) -> list[Figure]:
    """Count wake-ups and CPU of minutes without agents, and with one that beats every 5 s and has a poll held."""
    minute_s, warm_up_s = bench.pick((MINUTE_S, WARM_UP_S), (0.5, 0.2))
    wake_ups_s: dict[tuple[int, str], list[float]] = {}
    cpu_ms: dict[tuple[int, str], list[float]] = {}
    for _ in range(bench.pick(MINUTES, 1)):
        with ExitStack() as running:
            servers = {
                (agents, name): bench.shim(controller, poll={"hold": HOLD_S}) if name == "ours" else bench.bare()
                for agents in (0, 1)
                for name in ("ours", "bare")
            }
            for name in ("ours", "bare"):
                for plan in _agent(servers[1, name], "poll" if name == "ours" else "hang", minute_s + 2 * warm_up_s):
                    running.enter_context(loads.start(plan))
            time.sleep(warm_up_s)
            before = {key: (server.wake_ups(), server.cpu_s()) for key, server in servers.items()}
            time.sleep(minute_s)
            for key, server in servers.items():
                wake_ups_s.setdefault(key, []).append((server.wake_ups() - before[key][0]) / minute_s)
                cpu_ms.setdefault(key, []).append((server.cpu_s() - before[key][1]) / minute_s * MINUTE_S * 1e3)
        for server in servers.values():  # after what loads them
            end(server.process)
    figures = []
    for agents, who, most_wake_ups, most_ms in ((0, "no agents", 2.0, 60.0), (1, "1 agent at 5 s", 3.0, None)):
        waking, cpu = wake_ups_s[agents, "ours"], cpu_ms[agents, "ours"]
        figures += [
            _absolute(f"wake-ups a second, {who}", "", waking, wake_ups_s[agents, "bare"], most_wake_ups),
            _absolute(f"CPU of a minute, {who}", "ms", cpu, cpu_ms[agents, "bare"], most_ms),
        ]
        log(f"{who}: {median(waking):.2f} wake-ups a second, {median(cpu):.0f} ms of CPU a minute")
    return figures


def _absolute(what: str, unit: str, ours: list[float], bare: list[float], aim: float | None) -> Figure:
    note = spread(ours)
    return Figure(PART, what, unit, median(ours), median(bare), "aiohttp", aim=aim, absolute=True, note=note)


def _agent(server: Server, path: str, duration_s: float) -> list[Plan]:
    """Return the two connections of an agent: heartbeats, and a poll that waits."""
    beats = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.heartbeat(server, 0)],
        connections=1,
        mode="paced",
        duration_s=duration_s,
        interval_s=INTERVAL_S,
    )
    polls = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, 0, path)],
        connections=1,
        mode="polling",
    )
    return [polls, beats]
