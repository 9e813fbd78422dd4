"""`agent-shim status` with colours, for a terminal with rich installed."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shim.cli.status import HEAD, WORDS, View
from shim.clock import pause

_COLOURS = {"good": "green", "waiting": "dim", "warning": "yellow", "bad": "bold red"}
_ALIVE = HEAD.index("ALIVE")


def show(shown: View) -> None:
    """Print the status once."""
    Console().print(_render(shown))


def watch(shown: View, look: Callable[[], View], every_s: float) -> None:
    """Show the status on the full screen until Ctrl-C."""
    with Live(_render(shown), screen=True, auto_refresh=False) as live:
        while True:
            pause(every_s)
            live.update(_render(look()), refresh=True)


def _render(shown: View) -> Group:
    facts = Table.grid(padding=(0, 2))
    for name, text in shown.lines:
        facts.add_row(Text(name, style="dim"), Text(text))
    agents = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in HEAD:
        agents.add_column(head, no_wrap=True)
    for level, cells in shown.rows:
        agents.add_row(*(Text(cell, style=_COLOURS[level] if at == _ALIVE else "") for at, cell in enumerate(cells)))
    word = (f" {WORDS[shown.level]} ", f"reverse {_COLOURS[shown.level]}")
    return Group(
        Text.assemble(word, " ", (shown.sentence, "bold")),
        *(Text(f"  {hint}", style="dim") for hint in shown.hints),
        Text(),
        facts,
        Text(),
        *([agents] if shown.rows else []),
        *([Text(shown.more, style="dim")] if shown.more else []),
    )
