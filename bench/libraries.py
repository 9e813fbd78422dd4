"""`python -m bench.libraries`: what Python, each library and the shim's own code take of memory and start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from statistics import median

from bench.figures import number
from bench.servers import ROOT, SERVER_CORE, Bench, spawn

ROUNDS = 5
MB = 1e6
LIMIT_S = 120.0
PYTHON = "Python and its standard library"


@dataclass(frozen=True, slots=True)
class Library:
    """The cost of one distribution: resident memory, and time until the shim serves."""

    name: str
    rss_mb: float
    import_ms: float


def measure(bench: Bench) -> list[Library]:
    """Import everything in fresh processes, the largest share of memory first."""
    rounds = [_by_distribution(_modules(bench)) for _ in range(bench.pick(ROUNDS, 1))]
    found = [
        Library(name, median(one[name][0] for one in rounds) / MB, median(one[name][1] for one in rounds) * 1e3)
        for name in rounds[0]
    ]
    return sorted(found, key=lambda library: -library.rss_mb)


def _modules(bench: Bench) -> dict[str, tuple[float, float]]:
    # -P: otherwise the folder of the script would be searched for modules first
    process = spawn(["-P", str(ROOT / "bench" / "imports.py")], SERVER_CORE, bench.root, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=LIMIT_S)
    if process.returncode:
        raise RuntimeError("bench/imports.py failed")
    found: dict[str, tuple[float, float]] = json.loads(out)
    return found


def _by_distribution(modules: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    distributions = packages_distributions()
    sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for module, (rss_bytes, took_s) in modules.items():
        top = module.partition(".")[0]
        name = "agent-shim" if top == "shim" else distributions.get(top, [PYTHON])[0]
        sums[name] = (sums[name][0] + rss_bytes, sums[name][1] + took_s)
    return sums


def markdown(libraries: list[Library]) -> list[str]:
    """Return the table, with its sum."""
    total = Library("**all**", sum(each.rss_mb for each in libraries), sum(each.import_ms for each in libraries))
    rows = [f"| {each.name} | {number(each.rss_mb)} | {number(each.import_ms)} |" for each in (*libraries, total)]
    return ["| | memory in MB | import in ms |", "|---|--:|--:|", *rows]


def main() -> int:
    """Print the table, measured from a wheel with bytecode."""
    with Bench() as bench:
        bench.install()
        print("\n".join(markdown(measure(bench))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
