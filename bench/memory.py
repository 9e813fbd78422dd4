"""Resident memory with 10,000 polls held, and over a million calls; `bench.idle` has that of an idle shim."""

from __future__ import annotations

import time

from bench import loads, requests
from bench.figures import Figure, Log, compared
from bench.load import Plan
from bench.servers import Bench, Server, end

PART = "Memory"
HELD = 10_000
HELD_ROUNDS = 3
SOAK_CALLS = 1_000_000
SOAK_CONNECTIONS = 64
SOAK_STEPS = 10
WARM_UP_ROUNDS = 40
SETTLE_S = 1.5
MB = 1e6


def measure(bench: Bench, log: Log) -> list[Figure]:
    """Measure both."""
    return [held(bench, log), soak(bench, log)]


def held(bench: Bench, log: Log) -> Figure:
    """Measure the cost of one more waiting request: a poll of an agent with a session, and a bare one."""
    controller = bench.controller()
    ours, bare = [], []
    count, settle_s = bench.pick((HELD, SETTLE_S), (50, 0.0))
    for _ in range(bench.pick(HELD_ROUNDS, 1)):
        shim = bench.shim(controller, poll={"hold": 20.0}, log={"level": "warning"})
        ours.append(_per_request(shim, "poll", count, settle_s))
        bare.append(_per_request(bench.bare("server"), "hang", count, settle_s))
    log(f"{count} held: {ours[-1]:.1f} kB each")
    return compared(PART, f"each of {count:,} held polls", "kB", ours, bare, against="hanging on aiohttp", aim=1.3)


def _per_request(server: Server, path: str, count: int, settle_s: float) -> float:
    time.sleep(settle_s)
    before = server.rss_bytes()
    plan = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, number, path) for number in range(count)],
        connections=count,
        mode="held",
    )
    with loads.start(plan) as process:
        loads.held(process)
        time.sleep(settle_s)
        grown = server.rss_bytes() - before
    end(server.process)
    return grown / count / 1e3


def soak(bench: Bench, log: Log) -> Figure:
    """Heartbeats and polls in turn, over new connections in each tenth.

    What closed connections leave is searched for rarely (`shim.process`), so memory has a level that it reaches after
    some thousand of them; and the first tenth fills caches and pools. Growth after that is what counts.
    """
    controller = bench.controller()
    server = bench.shim(controller, poll={"hold": "off"}, log={"level": "warning"})
    for _ in range(bench.pick(WARM_UP_ROUNDS, 1)):
        _calls(server, SOAK_CONNECTIONS)
    sizes = []
    calls, steps = bench.pick((SOAK_CALLS, SOAK_STEPS), (2000, 2))
    for step in range(steps):
        _calls(server, calls // steps)
        sizes.append(server.rss_bytes())
        log(f"soak: {(step + 1) * calls // steps:,} calls, {sizes[-1] / MB:.1f} MB")
    grown = (sizes[-1] - sizes[0]) / MB
    note = f"{sizes[0] / MB:.1f} MB after the first tenth, {sizes[-1] / MB:.1f} MB in the end"
    return Figure(PART, f"growth over {calls:,} calls", "MB", grown, aim=1.0, absolute=True, note=note)


def _calls(server: Server, total: int) -> None:
    makes = (requests.heartbeat, requests.poll)
    plan = Plan(
        host=server.host,
        port=server.port,
        requests=[makes[number % 2](server, number // 2) for number in range(SOAK_CONNECTIONS)],
        connections=SOAK_CONNECTIONS,
        total=total,
    )
    found = loads.run(plan)
    if found.errors:
        raise RuntimeError(f"{found.errors} calls of the soak failed")
