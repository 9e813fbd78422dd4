"""The CPU that forwarding a heartbeat costs.

Two replicas share an empty database; one of them owns the shard of the configured token. The same heartbeats go to the
owner directly and through the other replica; both processes' CPU is counted each time.
"""

from __future__ import annotations

import time
from statistics import median

from bench import database, loads, requests
from bench.figures import Figure, Log, compared
from bench.load import Plan
from bench.servers import Bench, Server, end

PART = "Heartbeats through a replica that does not own the agent"
AIM = 1.4
ROUNDS = 9
CONNECTIONS = 32
FEW = 2 * CONNECTIONS  # calls, not seconds: on a busy machine none may be answered in a fifth of one
OWNED_S = 120.0


def measure(bench: Bench, log: Log) -> list[Figure]:
    """The figure, from a database of its own."""
    with database.running() as server:
        costs_us = _costs_us(bench, server.create())
    found = (costs_us["forwarded"], costs_us["direct"])
    log(f"forwarded heartbeat: {median(found[0]):.0f} µs of CPU, direct {median(found[1]):.0f} µs")
    return [compared(PART, "CPU per heartbeat, both processes", "µs", *found, against="direct", aim=AIM)]


def _costs_us(bench: Bench, url: str) -> dict[str, list[float]]:
    """Rounds of one second, directly and forwarded in turn; a first round warms up."""
    controller = bench.controller()
    both = [bench.shim(controller, log={"level": "warning"}, store={"url": url}, cluster={"port": 0}) for _ in range(2)]
    owner = _owner(both)
    other = next(each for each in both if each is not owner)
    costs_us: dict[str, list[float]] = {"direct": [], "forwarded": []}
    for round_ in range(bench.pick(ROUNDS, 1) + 1):
        for name, server in (("direct", owner), ("forwarded", other)):
            cost_us = _round(server, both, bench.pick(0, FEW))
            if round_:
                costs_us[name].append(cost_us)
    for each in (*both, controller):  # before their database
        end(each.process)
    return costs_us


def _owner(both: list[Server]) -> Server:
    """Wait until all shards are owned, and return the owner of the configured token's: it has the link."""
    until = time.monotonic() + OWNED_S
    while time.monotonic() < until:
        for server in both:
            if server.status()["links"]["online"]:
                return server
        time.sleep(0.1)
    raise RuntimeError("no replica has the link")


def _round(server: Server, both: list[Server], total: int) -> float:
    """Measure CPU microseconds per call: for a second, or over `total` calls if it is not 0."""
    plan = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.heartbeat(server, number) for number in range(CONNECTIONS)],
        connections=CONNECTIONS,
        total=total,
    )
    before_s = sum(each.cpu_s() for each in both)
    found = loads.run(plan)
    if found.errors:
        raise RuntimeError(f"{found.errors} calls failed")
    return (sum(each.cpu_s() for each in both) - before_s) / found.answers * 1e6
