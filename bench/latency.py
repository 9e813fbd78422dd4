"""From the controller's `send` to the command in the agent's hand (item 1)."""

from __future__ import annotations

import json
import subprocess
import time
from statistics import median

from bench import loads, requests, simulation
from bench.controller import Send
from bench.figures import Figure, Log, number
from bench.load import Plan
from bench.requests import cluster
from bench.servers import OTHER_CORES, TOKEN, Bench, Server, spawn
from shim.tools.latency import percentile

SIMULATED = "Latency of single commands, an hour of virtual time"
REAL = "Latency, real time"
QUIET = {"level": "warning"}
SHARE_SESSIONS = 1000
SHARE_COMMANDS = 800
SHARE_ROUNDS = 3
SHARE_RATE_HZ = 200.0
FLEET_AGENTS = 50
FLEET_S = 15
FLEET_RATE_HZ = 2.0


def measure(bench: Bench, log: Log) -> list[Figure]:
    """Virtual time for the agents' paces, real time for what the shim itself takes."""
    return [*_paces(log), *_fleet(bench, log), *_share(bench, log)]


def _paces(log: Log) -> list[Figure]:
    figures: list[Figure] = []
    found = {hold: simulation.latencies_s(hold) for hold in ("off", "auto")}
    for (pace, interval_s), auto in found["auto"].items():
        off = sorted(found["off"][pace, interval_s])
        held = sorted(auto)
        log(f"{pace} {interval_s:.0f} s: {len(held)} commands")
        for q in (50, 95, 99):
            ours, base = percentile(held, q), percentile(off, q)
            # An agent that polls at a fixed rate is always held if its interval fits into a hold.
            aim = 0.1 if pace == "ticker" and interval_s <= 20 and q == 99 else None
            what = f"{'fixed rate' if pace == 'ticker' else 'fixed pause'} {interval_s:.0f} s, p{q}"
            ratios = (ours / base,) if base else ()
            figures.append(Figure(SIMULATED, what, "s", ours, base, "hold off", ratios, aim=aim, absolute=True))
    return figures


def _fleet(bench: Bench, log: Log) -> list[Figure]:
    """`fleet`, whose agents poll every 5 s at a fixed rate: with holds that were learnt, without, and by `naive`."""
    figures: list[Figure] = []
    controller = bench.dev_controller()
    servers = {
        "auto": bench.shim(controller, log=QUIET),
        "hold off": bench.shim(controller, log=QUIET, poll={"hold": "off"}),
        "naive": bench.naive(controller),
    }
    found: dict[str, dict[str, float]] = {}
    for name, server in servers.items():
        if name == "auto":
            _run_fleet(server, None, name, 45)  # the holds grow by a second with each poll
        found[name] = _run_fleet(server, controller, name, FLEET_S)
        log(f"fleet, {name}: p50 {found[name]['p50_s'] * 1e3:.1f} ms, p99 {found[name]['p99_s'] * 1e3:.1f} ms")
    for name in ("hold off", "naive"):
        for q in ("p50_s", "p95_s", "p99_s"):
            ours, base = found["auto"][q], found[name][q]
            what = f"{FLEET_AGENTS} agents polling every 5 s, {q[:-2]}"
            aim = 0.1 if q == "p99_s" and name == "hold off" else None
            figures.append(Figure(REAL, what, "s", ours, base, name, (ours / base,), aim=aim, absolute=True))
    return figures


def _run_fleet(server: Server, controller: Server | None, name: str, duration_s: int) -> dict[str, float]:
    args = ["-m", "shim", "fleet", "--url", server.url, "--agents", str(FLEET_AGENTS), "--token", TOKEN]
    args += ["--dialect", "clusters_agent", "--poll-interval", "5", "--heartbeat-interval", "5", "--spread", "4.5"]
    args += ["--duration", str(duration_s), "--prefix", name.replace(" ", "-"), "--json", "-"]
    if controller is not None:
        args += ["--control", controller.url, "--rate", str(FLEET_RATE_HZ)]
    process = spawn(args, OTHER_CORES, stdout=subprocess.PIPE)
    out, _ = process.communicate()
    if controller is None:
        return {}
    report = json.loads(out)
    latency: dict[str, float] = report["commands"]["latency"]
    return latency


def _share(bench: Bench, log: Log) -> list[Figure]:
    """What the shim itself takes while 1,000 polls are held, by its own histogram and by what agents see."""
    controller = bench.controller()
    server = bench.shim(controller, poll={"hold": 20.0}, log={"level": "warning"})
    plan = Plan(
        host=server.host,
        port=server.port,
        requests=[requests.poll(server, n) for n in range(SHARE_SESSIONS)],
        connections=SHARE_SESSIONS,
        mode="polling",
    )
    seen_ms: list[list[float]] = []
    with loads.start(plan) as process:
        loads.held(process)
        time.sleep(1.0)
        clusters = [cluster(n) for n in range(SHARE_SESSIONS)]
        jobs = [Send(clusters, SHARE_COMMANDS, SHARE_RATE_HZ, f"share-{n}") for n in range(SHARE_ROUNDS)]
        sent_s: list[dict[str, float]] = [controller.ask(job)["sent"] for job in jobs]
        time.sleep(0.5)
        in_hand_s = loads.found(process).in_hand_s
    for sent in sent_s:
        if missing := sent.keys() - in_hand_s.keys():
            raise RuntimeError(f"{len(missing)} commands did not arrive")
        seen_ms.append(sorted((in_hand_s[command_id] - at_s) * 1e3 for command_id, at_s in sent.items()))
    log(f"own share: p99 {percentile(seen_ms[-1], 99):.1f} ms at the agent")
    held = f"{SHARE_SESSIONS:,} sessions held, {SHARE_RATE_HZ:.0f} commands/s"
    figures = []
    for q in (50, 95, 99):
        found = sorted(percentile(each, q) for each in seen_ms)
        note = f"rounds from {number(found[0])} to {number(found[-1])} ms"
        figures.append(Figure(REAL, f"{held}, in hand p{q}", "ms", median(found), note=note))
    for q in (50, 99):
        bound_ms = server.histogram_quantile("agent_shim_command_offer_seconds", q / 100) * 1e3
        aim = 10.0 if q == 99 else None
        note = "upper bound of the bucket of agent_shim_command_offer_seconds" if q == 99 else ""
        what = f"{held}, the shim's own share, p{q} at most"
        figures.append(Figure(REAL, what, "ms", bound_ms, aim=aim, absolute=True, note=note))
    return figures
