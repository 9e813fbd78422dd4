"""The table, the JSON beside it, and the pages that show them: no figure in the documentation is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import database, forwarding, latency, machine, plan, replicas, sizing, traffic
from bench.figures import Figure, from_json, markdown, table
from bench.servers import ROOT
from devtools.latency import duration

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"
DOCS = ROOT / "docs"
DATA = DOCS / "reference" / "performance.json"
PAGES = {
    "README.md": ROOT / "README.md",
    "performance.md": DOCS / "reference" / "performance.md",
    "sizing.md": DOCS / "reference" / "sizing.md",
}
OF_SIZING = (sizing.PART, traffic.PART, replicas.PART)
OF_DATABASE = (database.STORE_PART, forwarding.PART, replicas.PART, replicas.CHANGES)


def content(figures: Sequence[Figure], rows: Sequence[sizing.Row], fleet: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, as plain data. `fleet` is that of several replicas, empty without them."""
    on_database = {"about": machine.described(), "load": machine.load(), "fleet": fleet} if fleet else {}
    return {
        "database": on_database,
        "about": machine.described(),
        "load": machine.load(),
        "figures": [figure.to_json() for figure in figures],
        "sizing": [asdict(row) for row in rows],
    }


def write_json(path: Path, found: dict[str, Any]) -> None:
    """For machines."""
    path.write_text(json.dumps(found, indent=1) + "\n")


def merged(found: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return what the pages show: these figures in the place of those of the same parts, or, of a whole run, these.

    A whole run without PostgreSQL keeps the parts with it from the run before.
    """
    shown: dict[str, Any] = json.loads(DATA.read_text())
    if whole:
        kept = [each for each in shown["figures"] if each["part"] in OF_DATABASE and not found["database"]]
        on_database = found["database"] or shown.get("database", {})
        return {**found, "figures": [*found["figures"], *kept], "database": on_database}
    anew = {each["part"] for each in found["figures"]}
    kept = [each for each in shown["figures"] if each["part"] not in anew]
    behind = len(kept)
    if not found["database"]:
        behind = next((n for n, each in enumerate(kept) if each["part"] == latency.REAL), behind)
    on_database = found["database"] or shown.get("database", {})
    return {**shown, "figures": [*kept[:behind], *found["figures"], *kept[behind:]], "database": on_database}


def text(found: dict[str, Any]) -> str:
    """What a terminal shows."""
    lines = [*_about(found), "", *table(_figures(found))]
    if found["sizing"]:
        lines += ["", *sizing.markdown(_rows(found))]
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
    return "\n".join([before + BEGIN, *lines, END + after])


def write_pages(found: dict[str, Any]) -> None:
    """The pages and the JSON beside them."""
    write_json(DATA, found)
    for name, path in PAGES.items():
        path.write_text(rendered(path.read_text(), name, found))
    plan.write(found)


def _in_short(found: dict[str, Any]) -> str:
    """What holding polls does for half of all commands, as a part of a sentence."""
    of = (latency.REAL, f"{latency.FLEET_AGENTS} agents polling every 5 s, p50", "hold off")
    figure = next(each for each in _figures(found) if (each.part, each.what, each.against) == of)
    return f"{duration(figure.ours)} instead of {duration(figure.baseline or 0.0)}"


def _figures(found: dict[str, Any]) -> list[Figure]:
    return [from_json(each) for each in found["figures"]]


def _rows(found: dict[str, Any]) -> list[sizing.Row]:
    return [sizing.Row(**each) for each in found["sizing"]]


def _about(found: dict[str, Any]) -> list[str]:
    known, on_database = found["about"], found.get("database")
    lines = [
        f"{known['machine']}; {known['system']}",
        f"{known['python']}, {known['libraries']}",
        f"agent-shim {known['shim']}, {known['date']}; load before the end {found['load']:.1f}",
    ]
    if on_database:
        known = on_database["about"]
        lines.append(
            f"with PostgreSQL: {known['machine']}; agent-shim {known['shim']}, {known['date']};"
            f" load before the end {on_database['load']:.1f}"
        )
    return lines
