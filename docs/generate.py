"""Draw docs/contributing/state-machines.md from the tables of `shim.core`.

`make docs` writes the page, `--check` compares it.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from shim.core import command_queue, link_state
from shim.core.backoff import Backoff, BackoffPolicy
from shim.core.link_state import EVENT_TYPES, DialFailed, LinkEvent, LinkState, LinkStateMachine, Lost
from shim.core.records import CommandState

DOCUMENT = Path(__file__).parent / "contributing" / "state-machines.md"
WALKS = 2_000
STEPS = 30

Edge = tuple[Enum, Enum, str]

PROSE = """# State machines

Generated from the tables in `shim/core` by `make docs`; do not edit. What changes no state is not drawn.

## The upstream link

`TRANSITIONS` in `shim/core/link_state.py` (docs/reference/protocol.md#21-link-life). An event without a
cell raises and changes nothing. If one event has two arrows, the past decides: whether the other place for the token
was tried, whether `Retry-After` or a contended identity forbids a dial.

{link}

| event | meaning |
|---|---|
{events}

## A command

`TRANSITIONS` in `shim/core/command_queue.py` (docs/reference/protocol.md#3-commands).

{command}
"""


def link_edges() -> set[Edge]:
    """Every change of state that a link makes, found by random walks through all cells of its table."""
    rng = random.Random(1)  # noqa: S311 - nothing secret; the same walks every time
    variants: list[LinkEvent] = [kind() for kind in EVENT_TYPES]
    variants += [DialFailed(401), DialFailed(429, retry_after_s=60), Lost(by_close_frame=True)]
    edges: set[Edge] = set()
    visited: set[tuple[LinkState, type]] = set()
    for _ in range(WALKS):
        machine = LinkStateMachine("auto", Backoff(BackoffPolicy(), rng.random), own_token=rng.random() < 0.5)
        now = 0.0
        for _ in range(STEPS):
            event = rng.choice([each for each in variants if (machine.state, type(each)) in link_state.TRANSITIONS])
            now += rng.choice((0.0, 1.0, 10.0))
            before = machine.state
            machine.handle(event, now)
            visited.add((before, type(event)))
            edges.add((before, machine.state, type(event).__name__))
    if visited != set(link_state.TRANSITIONS):
        raise SystemExit(f"cells never reached: {set(link_state.TRANSITIONS) - visited}")
    return edges


def command_edges() -> set[Edge]:
    """Every change of state of a command."""
    return {(before, after, step.value) for (before, step), after in command_queue.TRANSITIONS.items()}


def diagram(first: Enum, order: Iterable[Enum], edges: set[Edge]) -> str:
    """The edges as a Mermaid diagram, those between the same two states as one."""
    place = {state: at for at, state in enumerate(order)}
    labels: dict[tuple[Enum, Enum], set[str]] = defaultdict(set)
    for before, after, label in edges:
        if before != after:
            labels[before, after].add(label)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    for before, after in sorted(labels, key=lambda pair: (place[pair[0]], place[pair[1]])):
        lines.append(f"    {before.name} --> {after.name}: {', '.join(sorted(labels[before, after]))}")
    return "\n".join([*lines, "```"])


def document() -> str:
    """Return the text that the file must have."""
    events = [f"| `{kind.__name__}` | {(kind.__doc__ or '').splitlines()[0].rstrip(':')} |" for kind in EVENT_TYPES]
    return PROSE.format(
        link=diagram(LinkState.IDLE, LinkState, link_edges()),
        events="\n".join(events),
        command=diagram(CommandState.QUEUED, CommandState, command_edges()),
    )


def main() -> int:
    """Write, or with `--check` compare."""
    text = document()
    if DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"docs/contributing/{DOCUMENT.name} is not what `make docs` writes")
        return 1
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"wrote docs/contributing/{DOCUMENT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
