"""Heartbeats and empty polls over keep-alive connections, as fast as one core answers them (item 2)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from bench import loads, requests
from bench.figures import Figure, Log, compared
from bench.load import Plan
from bench.servers import Bench, Server

PART = "Throughput: 32 keep-alive connections, one core"
ROUNDS = 9
CONNECTIONS = 32
FEW = 2 * CONNECTIONS  # calls, not seconds: on a busy machine none may be answered in a tenth of one
AIM = 0.7
QUIET = {"level": "warning"}

Make = Callable[[Server, int], bytes]


def measure(bench: Bench, log: Log) -> list[Figure]:
    """Rounds of one second, each against every server in turn; a first round warms up."""
    controller = bench.controller()
    servers = {
        "ours": bench.shim(controller, log=QUIET, poll={"hold": "off"}),
        "aiohttp": bench.bare("server"),
        "web.Application": bench.bare("app"),
        "naive": bench.naive(controller),
    }
    figures: list[Figure] = []
    rounds = bench.pick(ROUNDS, 1)
    for what, make in (("heartbeats", requests.heartbeat), ("empty polls", requests.poll)):
        rates: dict[str, list[float]] = {name: [] for name in servers}
        costs_us: dict[str, list[float]] = {name: [] for name in servers}
        for round_ in range(rounds + 1):
            for name, server in servers.items():
                rate, cost_us = _round(server, make, bench.pick(0, FEW))
                if round_:
                    rates[name].append(rate)
                    costs_us[name].append(cost_us)
            log(f"{what}: {median(rates['ours'] or [0]):,.0f}/s")
        for name in list(servers)[1:]:
            aim = AIM if name == "aiohttp" else None
            found = (rates["ours"], rates[name])
            figures.append(compared(PART, what, "1/s", *found, against=name, better="more", aim=aim))
        for name in list(servers)[1:]:
            rest = {
                "against": name,
                "note": "" if name != "aiohttp" else "does not depend on the load generator's speed",
            }
            figures.append(compared(PART, f"CPU per call, {what}", "µs", costs_us["ours"], costs_us[name], **rest))
    return figures


def _round(server: Server, make: Make, total: int) -> tuple[float, float]:
    """Measure calls per second and CPU microseconds per call: for a second, or over `total` calls if it is not 0."""
    plan = Plan(
        host=server.host,
        port=server.port,
        requests=[make(server, number) for number in range(CONNECTIONS)],
        connections=CONNECTIONS,
        total=total,
    )
    before_s = server.cpu_s()
    found = loads.run(plan)
    if found.errors:
        raise RuntimeError(f"{found.errors} calls failed")
    return found.answers / found.took_s, (server.cpu_s() - before_s) / found.answers * 1e6
