"""From the controller's `send` to the command in the agent's hand (item 1)."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from statistics import median

from bench import loads, requests, simulation
from bench.controller import Send
from bench.figures import Figure, Log, spread
from bench.load import Plan
from bench.requests import cluster
from bench.servers import OTHER_CORES, TOKEN, Bench, Server, spawn
from devtools.agents import PollStyle
from devtools.latency import percentile

SIMULATED = "Latency of single commands, an hour of virtual time"
REAL = "Latency, real time"
QUIET = {"level": "warning"}
SHARE_SESSIONS = 1000
SHARE_COMMANDS = 800
SHARE_ROUNDS = 5
SHARE_RATE_HZ = 200.0
SHARE = "agent_shim_command_offer_seconds"
AIM_MS = 10.0
FLEET_AGENTS = 50
FLEET_S = 60
FLEET_RATE_HZ = 4.0
# A hold is learnt within some polls, and whether heartbeats run beside them.
FLEET_WARM_UP_S = 75
MOST_HOLD_S = 20.0
IN_HAND_S = 3.0


def measure(bench: Bench, log: Log) -> list[Figure]:
    """Virtual time for the agents' paces, real time for what the shim itself takes."""
    return [*_paces(bench, log), *_fleets(bench, log), *_share(bench, log)]


def _paces(bench: Bench, log: Log) -> list[Figure]:
    figures: list[Figure] = []
    span = bench.pick(simulation.Span(), simulation.Span(1, 60.0, 200.0))
    found = {hold: simulation.latencies_s(hold, span) for hold in ("off", "auto")}
    for pace, interval_s in sorted(found["auto"].keys() & found["off"].keys(), reverse=True):
        off, held = (sorted(found[hold][pace, interval_s]) for hold in ("off", "auto"))
        ticker = pace == PollStyle.TICKER.value
        kind = f"fixed {'rate' if ticker else 'pause'} {interval_s:.0f} s"
        log(f"{kind}: {len(held)} commands")
        for q in (50, 95, 99):
            ours, base = percentile(held, q), percentile(off, q)
            # An agent that polls at a fixed rate is always held if its interval fits into a hold.
            aim = 0.1 if ticker and interval_s <= MOST_HOLD_S and q == 99 else None
            ratios = (ours / base,) if base else ()
            figures.append(
                Figure(SIMULATED, f"{kind}, p{q}", "s", ours, base, "hold off", ratios, aim=aim, absolute=True)
            )
    return figures


def _fleets(bench: Bench, log: Log) -> list[Figure]:
    """`fleet`, whose agents poll every 5 s at a fixed rate, of three servers at the same time."""
    controller = bench.dev_controller()
    servers = {
        "auto": bench.shim(controller, log=QUIET),
        "hold off": bench.shim(controller, log=QUIET, poll={"hold": "off"}),
        "naive": bench.naive(controller),
    }
    running = {name: _start_fleet(bench, server, controller, name) for name, server in servers.items()}
    found: dict[str, dict[str, float]] = {}
    for name, process in running.items():
        commands = json.loads(process.communicate()[0])["commands"]
        if commands["in_hand"] != commands["sent"]:
            raise RuntimeError(f"{name}: {commands['sent'] - commands['in_hand']} commands did not arrive")
        found[name] = commands["latency"]
        log(f"fleet, {name}: p50 {found[name]['p50_s'] * 1e3:.1f} ms, p99 {found[name]['p99_s'] * 1e3:.1f} ms")
    figures: list[Figure] = []
    for name in ("hold off", "naive"):
        for q in ("p50_s", "p95_s", "p99_s", "max_s"):
            ours, base = found["auto"][q], found[name][q]
            what = f"{FLEET_AGENTS} agents polling every 5 s, {q[:-2]}"
            aim = 0.1 if q == "p99_s" and name == "hold off" else None
            figures.append(Figure(REAL, what, "s", ours, base, name, (ours / base,), aim=aim, absolute=True))
    return figures


def _start_fleet(bench: Bench, server: Server, controller: Server, name: str) -> subprocess.Popen[bytes]:
    warm_up_s, measured_s = bench.pick((FLEET_WARM_UP_S, FLEET_S), (10, 5))
    args = ["-m", "shim", "fleet", "--url", server.url, "--agents", str(FLEET_AGENTS), "--token", TOKEN]
    args += ["--dialect", "clusters_agent", "--poll-interval", "5", "--heartbeat-interval", "5", "--spread", "4.5"]
    args += ["--duration", str(measured_s), "--warm-up", str(warm_up_s), "--rate", str(FLEET_RATE_HZ)]
    args += ["--prefix", name.replace(" ", "-"), "--control", controller.url, "--json", "-"]
    return spawn(args, OTHER_CORES, stdout=subprocess.PIPE)


def _share(bench: Bench, log: Log) -> list[Figure]:
    """Measure the share of the shim in a reply while 1,000 polls are held, by its histogram and as agents see it."""
    controller, sessions = bench.controller(), bench.pick(SHARE_SESSIONS, 20)
    server = bench.shim(controller, poll={"hold": MOST_HOLD_S}, log=QUIET)
    plan = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, n) for n in range(sessions)],
        connections=sessions,
        mode="polling",
    )
    sent_s: list[dict[str, float]] = []
    own: list[Counter[float]] = []
    with loads.start(plan) as process:
        loads.held(process)
        time.sleep(1.0)
        clusters = [cluster(n) for n in range(sessions)]
        before = server.buckets(SHARE)
        for round_ in range(bench.pick(SHARE_ROUNDS, 1)):
            job = Send(clusters, bench.pick(SHARE_COMMANDS, 20), SHARE_RATE_HZ, f"share-{round_}")
            sent_s.append(controller.ask(job)["sent"])
            time.sleep(0.5)
            after = server.buckets(SHARE)
            own.append(Counter({bound: count - before[bound] for bound, count in after.items()}))
            before = after
        time.sleep(IN_HAND_S)
        in_hand_s = loads.found(process).in_hand_s
    seen_ms = [_latencies_ms(sent, in_hand_s) for sent in sent_s]
    log(f"own share: p99 {percentile(seen_ms[-1], 99):.1f} ms at the agent")
    held = f"{sessions:,} sessions held, {SHARE_RATE_HZ:.0f} commands/s"
    figures = []
    for q in (50, 95, 99):
        found = [percentile(each, q) for each in seen_ms]
        figures.append(Figure(REAL, f"{held}, in hand p{q}", "ms", median(found), note=spread(found)))
    for q in (50, 99):
        found = [_at_most(each, q / 100) * 1e3 for each in own]
        aim = AIM_MS if q == 99 else None
        note = f"{spread(found)}; each is the upper bound of a bucket of `{SHARE}`"
        what = f"{held}, the shim's own share, p{q} at most"
        figures.append(Figure(REAL, what, "ms", median(found), aim=aim, absolute=True, note=note))
    return figures


def _latencies_ms(sent_s: dict[str, float], in_hand_s: dict[str, float]) -> list[float]:
    if missing := sent_s.keys() - in_hand_s.keys():
        raise RuntimeError(f"{len(missing)} commands did not arrive")
    return sorted((in_hand_s[command_id] - at_s) * 1e3 for command_id, at_s in sent_s.items())


def _at_most(buckets: Counter[float], q: float) -> float:
    """The upper bound of the bucket that holds the quantile."""
    return next(bound for bound, count in sorted(buckets.items()) if count >= q * buckets[float("inf")])
