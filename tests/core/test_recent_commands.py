"""The latest commands, as the status page shows them."""

from __future__ import annotations

from shim.core.command_queue import SHOWN_COMMANDS, RecentCommands
from shim.core.records import TraceEntry
from tests.support.stores import KEY, OTHER


def test_a_command_is_shown_once_with_its_newest_step_the_newest_first() -> None:
    recent = RecentCommands()
    recent.note(KEY, ("1",), TraceEntry(1.0, "arrived", "exec"))
    recent.note(KEY, ("2",), TraceEntry(2.0, "arrived", "scan"))
    recent.note(KEY, ("1",), TraceEntry(3.0, "offered", "attempt 1"))
    recent.note(OTHER, ("1",), TraceEntry(4.0, "dead", "why"))
    assert [(each.id, each.session, each.event, each.type, each.arrived_unix) for each in recent] == [
        ("1", OTHER, "dead", "", 0.0),
        ("1", KEY, "offered", "exec", 1.0),
        ("2", KEY, "arrived", "scan", 2.0),
    ]


def test_only_so_many_are_kept_also_of_one_batch() -> None:
    recent = RecentCommands()
    recent.note(KEY, tuple(map(str, range(3 * SHOWN_COMMANDS))), TraceEntry(1.0, "offered"))
    recent.note(KEY, ("last",), TraceEntry(2.0, "arrived"))
    shown = [each.id for each in recent]
    assert (len(shown), shown[:2]) == (SHOWN_COMMANDS, ["last", str(3 * SHOWN_COMMANDS - 1)])
