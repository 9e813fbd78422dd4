"""`python -m bench [--only part …] [--docs]`: measure, show one table, write the JSON beside it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import (
    database,
    durable,
    first_minutes,
    idle,
    latency,
    libraries,
    memory,
    overload,
    report,
    sizing,
    throughput,
    traffic,
)
from bench.figures import Figure, Log
from bench.servers import ROOT, Bench, allow_files

WANTED_FILES = 17_000
OF_DATABASE = ("postgres", "forwarding", "replicas")
"""Parts with baselines of their own, skipped without PostgreSQL."""
PARTS = (
    "latency",
    "first_minutes",
    "throughput",
    "memory",
    "durable",
    "overload",
    "traffic",
    "idle",
    "sizing",
    *OF_DATABASE,
)


def main() -> None:
    """Parts run one after the other, each with processes of its own."""
    given = _parsed()
    if given.render:
        report.write_pages(json.loads(report.DATA.read_text()))
        return
    started_s = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - started_s:6.0f} s  {line}", file=sys.stderr, flush=True)

    figures: list[Figure] = []
    rows: list[sizing.Row] = []
    used: list[libraries.Library] = []
    fleet: dict[str, Any] = {}

    def size(bench: Bench, _log: Log) -> list[Figure]:
        found, more = sizing.measure(bench, log)
        rows.extend(more)
        return found

    def rest(bench: Bench, _log: Log) -> list[Figure]:
        found, more = idle.measure(bench, log)
        used.extend(more)
        return found

    def on_database(name: str, bench: Bench) -> list[Figure]:
        found = import_module(f"bench.{name}").measure(bench, log)  # psycopg is an extra
        if name != "replicas":
            return list(found)
        fleet.update(asdict(found[1]))
        return list(found[0])

    parts = (
        latency.measure,
        first_minutes.measure,
        throughput.measure,
        memory.measure,
        durable.measure,
        overload.measure,
        traffic.measure,
        rest,
        size,
        *(lambda bench, _log, name=name: on_database(name, bench) for name in OF_DATABASE),
    )
    if (files := allow_files()) < WANTED_FILES:
        log(f"only {files} open files are allowed here: {WANTED_FILES} may be needed")
    missing = database.missing()
    for name, measure in zip(PARTS, parts, strict=True):
        if given.only and name not in given.only:
            continue
        if name in OF_DATABASE and missing:
            log(f"{name}: SKIPPED, {missing}")
            continue
        with Bench(quick=given.quick) as bench:
            figures += measure(bench, log)
        report.write_json(given.json, report.content(figures, rows, used, fleet))
    found = report.content(figures, rows, used, fleet)
    print(report.text(found))
    if given.docs and figures:
        report.write_pages(report.merged(found, whole=not given.only))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", action="extend", default=[], metavar="PART", choices=PARTS, help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="a little of everything: shows that it works, no figures")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results.json", metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write performance.md, sizing.md and performance.json")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the pages anew from the JSON")
    given: argparse.Namespace = parser.parse_args()
    if given.docs and given.quick:
        parser.error("--quick measures nothing that could be shown: --docs does not go with it")
    return given


if __name__ == "__main__":
    main()
