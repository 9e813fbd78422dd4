"""The table, the JSON beside it, and the pages that show them: no figure in the documentation is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, sizing
from bench.figures import Figure, markdown, table

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"


def text(figures: Sequence[Figure], rows: Sequence[sizing.Row]) -> str:
    """What a terminal shows."""
    lines = [*_about(), "", *table(figures)]
    if rows:
        lines += ["", *sizing.markdown(list(rows))]
    return "\n".join(lines)


def write_json(path: Path, figures: Sequence[Figure], rows: Sequence[sizing.Row]) -> None:
    """Everything, for machines."""
    content: dict[str, Any] = {
        "about": machine.described(),
        "load": machine.load(),
        "figures": [figure.to_json() for figure in figures],
        "sizing": [{name: getattr(row, name) for name in row.__slots__} for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_pages(docs: Path, figures: Sequence[Figure], rows: Sequence[sizing.Row]) -> None:
    """Put the tables between the markers of the pages."""
    about = ["", *(f"- {line}" for line in _about()), ""]
    _between(docs / "performance.md", [*about, *markdown(figures), ""])
    if rows:
        _between(docs / "sizing.md", [*about, *sizing.markdown(list(rows)), ""])


def _about() -> list[str]:
    known = machine.described()
    return [
        f"{known['machine']}; {known['system']}",
        f"{known['python']}, {known['libraries']}",
        f"agent-shim {known['shim']}, {known['date']}; load before the end {machine.load():.1f}",
    ]


def _between(path: Path, lines: Sequence[str]) -> None:
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text("\n".join([before + BEGIN, *lines, END + after.rstrip("\n"), ""]))
