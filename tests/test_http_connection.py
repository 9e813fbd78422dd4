"""The common limit on the bytes that connections hold.

What a whole connection does with its bytes is tried in `tests/agent_api/test_bounds.py`.
"""

from __future__ import annotations

import pytest

from shim.core.bounds import Budget


@pytest.mark.parametrize("size", [1, 60, 100])
def test_a_budget_gives_what_it_has_and_no_more(size: int) -> None:
    budget = Budget(100)
    assert budget.reserve(size)
    assert not budget.reserve(101 - size)
    assert budget.used_bytes == size
    budget.release(size)
    assert budget.reserve(100)
