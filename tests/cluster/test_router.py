"""Calls without an owner, and the way of evidence to whoever made a reply."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("psycopg")

from shim.cluster.forwarding import RemoteReceipt
from shim.cluster.router import LocalReceipt, Router
from shim.config.settings import Settings
from shim.protocol.reply_notes import Note


class Carrier:
    """A connection to another replica, and the pool that gets it back."""

    def __init__(self) -> None:
        self.noted: list[Note] = []
        self.released = 0

    def notify(self, kind: Note) -> None:
        self.noted.append(kind)

    def release(self, connection: Any) -> None:
        assert connection is self
        self.released += 1


def router() -> Router:
    locator: Any = None
    return Router(locator, Settings)


def remote(connection: int) -> tuple[RemoteReceipt, Carrier]:
    carrier: Any = Carrier()
    return RemoteReceipt(carrier, carrier, connection), carrier


@pytest.mark.parametrize(
    "end, noted",
    [
        (lambda of: of.next_request(7), Note.NEXT),
        (lambda of: of.connection_closed(7, True), Note.CLOSED_CLEANLY),
        (lambda of: of.connection_closed(7, False), Note.CLOSED),
    ],
)
def test_evidence_of_a_connection_reaches_the_owner_once(end: Any, noted: Note) -> None:
    routing = router()
    receipt, carrier = remote(7)
    other, untouched = remote(8)
    for each in (receipt, other):
        routing.written(each)
    end(routing)
    end(routing)
    assert carrier.noted == [Note.WRITTEN, noted]
    assert carrier.released == 1
    assert untouched.noted == [Note.WRITTEN]


def test_a_reply_that_was_not_written_frees_its_connection() -> None:
    routing = router()
    receipt, carrier = remote(7)
    routing.unwritten(receipt)
    routing.next_request(7)
    assert (carrier.noted, carrier.released) == ([Note.UNWRITTEN], 1)


def test_replies_of_several_owners_may_await_evidence_on_one_connection() -> None:
    routing, seen = router(), []

    class Bridge:
        def written(self, receipt: Any) -> None:
            seen.append(("written", receipt))

        def next_request(self, connection: int) -> None:
            seen.append(("next", connection))

    bridge: Any = Bridge()
    receipt, carrier = remote(7)
    routing.written(LocalReceipt(bridge, "offer", 7))
    routing.written(receipt)
    routing.next_request(7)
    assert seen == [("written", "offer"), ("next", 7)]
    assert carrier.noted == [Note.WRITTEN, Note.NEXT]
