"""Parts of the server's connections: the end of heads and bodies in pieces, and the common limit on held bytes.

What a whole connection does with its bytes is tried in `tests/agent_api/test_bounds.py`.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.bounds import Budget
from shim.http_connection import EmptyLine

END = b"\r\n\r\n"


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", END]), max_size=12).map(b"".join), st.data())
def test_an_empty_line_is_found_wherever_it_is_cut(text: bytes, data: st.DataObject) -> None:
    search, seen, found = EmptyLine(), 0, 0
    rest = text
    while rest:
        piece = rest[: data.draw(st.integers(1, len(rest)))]
        end = search.find(piece)
        if end:
            found = seen + end
            break
        seen += len(piece)
        rest = rest[len(piece) :]
    at = text.find(END)
    assert found == (0 if at < 0 else at + len(END))


def test_a_search_begins_anew_behind_each_empty_line() -> None:
    search = EmptyLine()
    assert search.find(b"a\r\n\r\nb") == 5
    assert search.find(b"\n\r\n") == 0  # the line end before it belonged to the empty line that was found
    assert search.find(b"\r\n") == 2


@pytest.mark.parametrize("size", [1, 60, 100])
def test_a_budget_gives_what_it_has_and_no_more(size: int) -> None:
    budget = Budget(100)
    assert budget.reserve(size)
    assert not budget.reserve(101 - size)
    assert budget.used_bytes == size
    budget.release(size)
    assert budget.reserve(100)
