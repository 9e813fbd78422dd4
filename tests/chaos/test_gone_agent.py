"""Evidence from agents on another machine, in namespaces of their own (docs/reference/protocol.md#3-commands)."""

from __future__ import annotations

import pytest

from tests.support import network

pytestmark = pytest.mark.needs(*network.TOOLS)


def test_a_connection_that_only_looks_open_makes_no_poll_evidence() -> None:
    """The agent's machine was unreachable, or the agent died unread and its reset was lost: the command comes again."""
    assert network.found_by("tests.chaos.harness.gone_agent", 280) == {
        "unreachable": "offered again",
        "unread": "offered again",
        "read": "poll",
        "returned": "next request",
        "closed": "offered again",
    }
