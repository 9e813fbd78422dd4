"""`python -m bench [--only part …] [--docs]`: measure, show one table, write the JSON beside it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import durable, first_minutes, latency, memory, overload, report, sizing, throughput, traffic
from bench.figures import Figure
from bench.servers import ROOT, Bench, allow_files

WANTED_FILES = 17_000
PARTS = ("latency", "first_minutes", "throughput", "memory", "durable", "overload", "traffic", "sizing")

VIRTUAL = {"first_minutes"}
"""Parts in virtual time: their figures are the same on every machine, and so may be written by themselves."""


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

    def size(bench: Bench, _log: Callable[[str], None]) -> list[Figure]:
        found, more = sizing.measure(bench, log)
        rows.extend(more)
        return found

    parts = (
        latency.measure,
        first_minutes.measure,
        throughput.measure,
        memory.measure,
        durable.measure,
        overload.measure,
        traffic.measure,
        size,
    )
    if (files := allow_files()) < WANTED_FILES:
        log(f"only {files} open files are allowed here: {WANTED_FILES} may be needed")
    for name, measure in zip(PARTS, parts, strict=True):
        if not given.only or name in given.only:
            with Bench(quick=given.quick) as bench:
                figures += measure(bench, log)
            report.write_json(given.json, report.content(figures, rows))
    found = report.content(figures, rows)
    print(report.text(found))
    if given.docs:
        report.write_pages(report.with_virtual(found) if given.only else found)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a little of everything: shows that it works, no figures")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results.json", metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write performance.md, sizing.md and performance.json")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the pages anew from the JSON")
    given: argparse.Namespace = parser.parse_args()
    if given.docs and (given.quick or not set(given.only) <= VIRTUAL):
        allowed = ", ".join(sorted(VIRTUAL))
        parser.error(f"the pages show one whole run: --docs goes with no --quick, and with --only of {allowed}")
    return given


if __name__ == "__main__":
    main()
