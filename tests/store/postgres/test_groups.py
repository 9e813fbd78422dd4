"""Rows that share a statement."""

from __future__ import annotations

import pytest

from shim.core.records import AddTrace, CommandState, FindCommand, TraceEntry
from shim.store.rows import MAX_STEPS_CHARS

pytest.importorskip("psycopg")

from tests.support.postgres_stores import client_of, stored
from tests.support.stores import KEY, mark, put

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


def test_commands_that_share_a_statement_keep_their_order_and_their_outcomes(pg_url: str) -> None:
    client = client_of(pg_url)
    names = [str(number) for number in range(75)]
    found = [client.wait(outcome) for outcome in [client.submit(put(name)) for name in [*names, "3", "40"]]]
    assert [each.duplicate for each in found] == [False] * 75 + [True] * 2
    assert (found[75].seq, found[76].seq) == (found[3].seq, found[40].seq)
    assert stored(pg_url) == names
    ((_, _, trace),) = client.one(FindCommand("3"))
    assert [step.event for step in trace] == ["arrived", "arrived"]
    client.close()


def test_each_row_of_a_shared_statement_has_its_own_outcome(pg_url: str) -> None:
    """One command's trace is full, one is not stored, and the rest are marked as usual."""
    client = client_of(pg_url)
    client.run(put("1"), put("full"), put("2"))
    client.run(AddTrace(KEY, ("full",), TraceEntry(1.0, "long", "x" * MAX_STEPS_CHARS)))
    step = TraceEntry(2.0, "offered")
    names = ["1", "full", "never", "2"]
    for outcome in [client.submit(mark(each, CommandState.OFFERED, 2.0, attempts=1)) for each in names]:
        assert client.wait(outcome) is None
    for name in names:
        (found,) = client.one(FindCommand(name))
        assert [each for each in found.trace if each.event == "offered"] == [step]
        assert found.record.attempts == (name != "never")
    client.close()


def test_a_command_whose_id_has_a_character_that_the_server_rejects_has_its_own_outcome(pg_url: str) -> None:
    """NUL is stored as a visible symbol, under which the command is found when it comes again."""
    client = client_of(pg_url)
    client.run(put("known"))
    for again in (False, True):
        outcomes = [client.submit(put(name)) for name in ("1", "a\0", "known", "2")]
        assert [client.wait(each).duplicate for each in outcomes] == [again, again, True, again]
    client.close()
    assert stored(pg_url) == ["known", "1", "a␀", "2"]
