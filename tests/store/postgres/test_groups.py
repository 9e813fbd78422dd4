"""Rows that share a statement."""

from __future__ import annotations

import pytest

from shim.core.records import AddTrace, FindCommand, TraceEntry

pytest.importorskip("psycopg")

from tests.support.postgres_stores import client_of, stored
from tests.support.stores import KEY, put

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


def test_commands_that_share_a_statement_keep_their_order_and_their_outcomes(pg_url: str) -> None:
    client = client_of(pg_url)
    names = [str(number) for number in range(75)]
    steps = [[put(name), AddTrace(KEY, (name,), TraceEntry(100.0, "arrived", "exec"))] for name in [*names, "3", "40"]]
    found = [client.wait(outcome) for outcome in [client.submit(*each) for each in steps]]
    assert [each.duplicate for each in found] == [False] * 75 + [True] * 2
    assert (found[75].seq, found[76].seq) == (found[3].seq, found[40].seq)
    assert stored(pg_url) == names
    ((_, _, trace),) = client.one(FindCommand("3"))
    assert [step.event for step in trace] == ["arrived", "arrived"]
    client.close()
