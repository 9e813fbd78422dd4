"""Measure what other agents notice while the controller sends far more commands for one agent than its queue takes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count

from bench import requests
from bench.controller import Send
from bench.figures import Figure, Log
from bench.servers import Bench, Server

PART = "A flood of commands for one agent"
FLOODS = (20_000, 100_000)
QUICK_FLOODS = (2000,)
AIM_MS = 100.0
FLOODED, OTHER = 1, 2
PACE_S = 0.005
SAMPLE_S = 0.02


@dataclass(slots=True)
class _Seen:
    """Measurements during a flood: seconds from a request to its reply, and resident memory."""

    heartbeats_s: list[float] = field(default_factory=list)
    results_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)


def measure(bench: Bench, log: Log) -> list[Figure]:
    """Return the longest waits of another agent's heartbeats and results during floods, and the memory they took."""
    figures: list[Figure] = []
    for flood in bench.pick(FLOODS, QUICK_FLOODS):
        controller = bench.controller()
        server = bench.shim(controller, upstream={"send_command_ack": True})
        with closing(_Agent(server)) as agent:
            for number in (FLOODED, OTHER):
                agent.ask(requests.heartbeat(server, number))
            before_bytes = server.rss_bytes()
            with _watching(server) as seen:
                job = Send([requests.cluster(FLOODED)], flood, 0, f"flood-{flood}", acked=True)
                took_s = controller.ask(job)["acked_s"]
        figures += _figures(flood, seen, took_s, before_bytes)
        log(f"flood of {flood}: {took_s:.1f} s, another agent's heartbeat {_longest_ms(seen.heartbeats_s):.0f} ms")
    return figures


def _figures(flood: int, seen: _Seen, took_s: float, before_bytes: int) -> Iterator[Figure]:
    for what, found in (("heartbeat", seen.heartbeats_s), ("result", seen.results_s)):
        half = sorted(found)[: len(found) // 2 + 1]
        yield Figure(
            PART,
            f"{flood:,} commands: another agent's slowest {what}",
            "ms",
            _longest_ms(found),
            aim=AIM_MS,
            absolute=True,
            note=f"of {len(found)}, half of them within {_longest_ms(half):.1f} ms",
        )
    grown_mib = (max(seen.rss_bytes, default=before_bytes) - before_bytes) / 2**20
    yield Figure(PART, f"{flood:,} commands: memory over that before", "MiB", grown_mib)
    what = f"{flood:,} commands: each stored or refused, and answered"
    yield Figure(PART, what, "1/s", flood / took_s, better="more")


def _longest_ms(found_s: list[float]) -> float:
    return max(found_s, default=0.0) * 1e3


class _Agent:
    """One keep-alive connection of an agent, one request at a time."""

    def __init__(self, server: Server) -> None:
        self._sock = socket.create_connection((server.host, server.port), timeout=120)
        self._file = self._sock.makefile("rb")

    def ask(self, request: bytes) -> float:
        """Send a request and read its answer; return the seconds that took."""
        started_s = time.perf_counter()
        self._sock.sendall(request)
        status = self._file.readline()
        length = 0
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self._file.read(length)
        if b" 20" not in status:
            raise RuntimeError(f"the shim answered {status!r}")
        return time.perf_counter() - started_s

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._sock.close()


@contextmanager
def _watching(server: Server) -> Iterator[_Seen]:
    """Call as another agent, and look at the process, until the block ends."""
    seen, stop, numbers = _Seen(), threading.Event(), count()

    def beat(agent: _Agent) -> None:
        seen.heartbeats_s.append(agent.ask(requests.heartbeat(server, OTHER)))

    def post(agent: _Agent) -> None:
        body = json.dumps({"success": True, "output": "done"}).encode()
        path = f"{requests.PATH}/{requests.cluster(OTHER)}/commands/result-{next(numbers)}/result"
        seen.results_s.append(agent.ask(requests.request(server, "POST", path, body)))

    def look(_: _Agent) -> None:
        seen.rss_bytes.append(server.rss_bytes())

    def repeat(what: Callable[[_Agent], None], pace_s: float) -> None:
        with closing(_Agent(server)) as agent:
            while not stop.wait(pace_s):
                what(agent)

    with ThreadPoolExecutor(3) as pool:
        watchers = [pool.submit(repeat, *each) for each in ((beat, PACE_S), (post, PACE_S), (look, SAMPLE_S))]
        try:
            yield seen
        finally:
            stop.set()
    for watcher in watchers:
        watcher.result()
