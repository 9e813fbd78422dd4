"""The table, the JSON beside it, and the pages that show them: no figure in the documentation is typed by hand."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import database, forwarding, idle, latency, libraries, plan, replicas, sizing, traffic
from bench.figures import Figure, from_json, markdown, table
from bench.servers import ROOT
from devtools.latency import duration
from shim import __version__

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"
DOCS = ROOT / "docs"
DATA = DOCS / "reference" / "performance.json"
PAGES = {
    "README.md": ROOT / "README.md",
    "performance.md": DOCS / "reference" / "performance.md",
    "sizing.md": DOCS / "reference" / "sizing.md",
}
OF_SIZING = (idle.PART, sizing.PART, traffic.PART, replicas.PART)
OF_DATABASE = (database.STORE_PART, forwarding.PART, replicas.PART, replicas.CHANGES)


def content(
    figures: Sequence[Figure], rows: Sequence[sizing.Row], used: Sequence[libraries.Library], fleet: dict[str, Any]
) -> dict[str, Any]:
    """Return everything that was measured, as plain data. `fleet` is that of several replicas, empty without them."""
    return {
        "about": described(),
        "load": load(),
        "apart": {},
        "figures": [figure.to_json() for figure in figures],
        "sizing": [asdict(row) for row in rows],
        "libraries": [asdict(each) for each in used],
        "fleet": fleet,
    }


def write_json(path: Path, found: dict[str, Any]) -> None:
    """For machines."""
    path.write_text(json.dumps(found, indent=1) + "\n")


def merged(found: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return what the pages show: what was found, and what they show already of all that was not measured this time.

    `apart` says of each part where and when it was measured, if that was not the last whole run.
    """
    shown: dict[str, Any] = json.loads(DATA.read_text())
    old, new = _by_part(shown), _by_part(found)
    of_run = {"about": found["about"], "load": found["load"]}
    of_old = {"about": shown["about"], "load": shown["load"]}
    about = {part: shown["apart"].get(part, of_old) for part in old} | dict.fromkeys(new, of_run)
    base = of_run if whole else of_old
    return {
        **base,
        "apart": {part: each for part, each in about.items() if each != base},
        "figures": [each for figures in (old | new).values() for each in figures],
        **{kind: found[kind] or shown[kind] for kind in ("sizing", "libraries", "fleet")},
    }


def _by_part(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for each in found["figures"]:
        parts.setdefault(each["part"], []).append(each)
    return parts


def text(found: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    lines = [*_about(found), "", *table(_figures(found))]
    if found["sizing"]:
        lines += ["", *sizing.markdown(_rows(found))]
    if found["libraries"]:
        lines += ["", *libraries.markdown(_libraries(found))]
    return "\n".join(lines)


def rendered(page: str, name: str, found: dict[str, Any]) -> str:
    """One of `PAGES` with what was measured between its markers."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    if name == "README.md":
        return f"{before}{BEGIN}{_in_short(found)}{END}{after}"
    lines = ["", *(f"- {line}" for line in _about(found)), ""]
    if name == "sizing.md":
        lines += ["### By number of agents", "", *sizing.markdown(_rows(found))]
    lines += markdown([each for each in _figures(found) if (each.part in OF_SIZING) == (name == "sizing.md")])
    if name == "sizing.md" and found["libraries"]:
        lines += ["", "### Memory and start by library", "", *libraries.markdown(_libraries(found))]
    return "\n".join([before + BEGIN, *lines, END + after])


def write_pages(found: dict[str, Any]) -> None:
    """The pages and the JSON beside them."""
    write_json(DATA, found)
    for name, path in PAGES.items():
        path.write_text(rendered(path.read_text(), name, found))
    plan.write(found)


def _in_short(found: dict[str, Any]) -> str:
    """Return the effect of held polls on the median command, as a part of a sentence."""
    of = (latency.REAL, f"{latency.FLEET_AGENTS} agents polling every 5 s, p50", "hold off")
    figure = next(each for each in _figures(found) if (each.part, each.what, each.against) == of)
    return f"{duration(figure.ours)} instead of {duration(figure.baseline or 0.0)}"


def _figures(found: dict[str, Any]) -> list[Figure]:
    return [from_json(each) for each in found["figures"]]


def _rows(found: dict[str, Any]) -> list[sizing.Row]:
    return [sizing.Row(**each) for each in found["sizing"]]


def _libraries(found: dict[str, Any]) -> list[libraries.Library]:
    return [libraries.Library(**each) for each in found["libraries"]]


def _about(found: dict[str, Any]) -> list[str]:
    known = found["about"]
    lines = [
        f"{known['machine']}; {known['system']}",
        f"{known['python']}, {known['libraries']}",
        f"agent-shim {known['shim']}, {known['date']}; load before the end {found['load']:.1f}",
    ]
    apart: dict[str, list[str]] = {}
    for part, each in found["apart"].items():
        known = each["about"]
        when = (
            f"{known['machine']}; agent-shim {known['shim']}, {known['date']}; load before the end {each['load']:.1f}"
        )
        apart.setdefault(when, []).append(f"*{part}*")
    return lines + [f"{', '.join(parts)}: {when}" for when, parts in apart.items()]


def described() -> dict[str, str]:
    """The machine and the software, by name."""
    return {
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gb():.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": f"aiohttp {version('aiohttp')}, uvloop {version('uvloop')}, SQLite {sqlite3.sqlite_version}",
        "shim": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def load() -> float:
    """Return the mean number of processes that were ready to run in the last minute."""
    return os.getloadavg()[0]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
