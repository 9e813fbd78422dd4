"""`python -m bench [--only part …] [--docs]`: measure, show one table, write the JSON beside it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import durable, latency, memory, report, sizing, throughput, traffic
from bench.figures import Figure
from bench.servers import ROOT, Bench, allow_files

WANTED_FILES = 17_000


def main() -> None:
    """Parts run one after the other, each with processes of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="throughput, memory, durable, …")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results.json", metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md and sizing.md")
    given = parser.parse_args()
    figures: list[Figure] = []
    rows: list[sizing.Row] = []
    started_s = time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - started_s:6.0f} s  {line}", file=sys.stderr, flush=True)

    def size(bench: Bench) -> list[Figure]:
        found, more = sizing.measure(bench, log)
        rows.extend(more)
        return found

    parts: dict[str, Callable[[Bench], list[Figure]]] = {
        "latency": lambda bench: latency.measure(bench, log),
        "throughput": lambda bench: throughput.measure(bench, log),
        "memory": lambda bench: memory.measure(bench, log),
        "durable": lambda bench: durable.measure(bench, log),
        "traffic": lambda _: traffic.measure(log),
        "sizing": size,
    }
    unknown = set(given.only) - parts.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    if (files := allow_files()) < WANTED_FILES:
        log(f"only {files} open files are allowed here: {WANTED_FILES} may be needed")
    for name, measure in parts.items():
        if not given.only or name in given.only:
            with Bench() as bench:
                figures += measure(bench)
    report.write_json(given.json, figures, rows)
    print(report.text(figures, rows))
    if given.docs:
        report.write_pages(ROOT / "docs", figures, rows)


if __name__ == "__main__":
    main()
