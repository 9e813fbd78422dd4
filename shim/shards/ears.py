"""Everything that comes in from NATS, to whom it concerns."""

from __future__ import annotations

from shim.logs import get
from shim.shards.lookup import Lookup
from shim.shards.relay import Relay
from shim.shards.service import Service
from shim.shards.table import Table
from shim.shards.wire import (
    Answered,
    Ask,
    Assembler,
    Closed,
    Envelope,
    Found,
    Left,
    Look,
    NextRequest,
    Present,
    Unwritten,
    WireError,
    Written,
)

log = get(__name__)


class Ears:
    """Implements `bus.Listener`."""

    def __init__(self, table: Table, relay: Relay, service: Service, lookup: Lookup) -> None:
        self._table = table
        self._relay = relay
        self._service = service
        self._lookup = lookup
        self._assembler = Assembler()
        self._living: frozenset[str] = frozenset()

    def message(self, data: bytes) -> None:
        """See `bus.Listener`. What cannot be read is logged and dropped."""
        try:
            envelope = self._assembler.take(data)
            if envelope is not None:
                self._hear(envelope)
        except WireError as error:
            log.error("relay_unreadable", error=str(error))

    def _hear(self, envelope: Envelope) -> None:
        sender = envelope.sender
        match envelope.said:
            case Ask() as said:
                self._service.ask(sender, said)
            case Answered() as said:
                self._relay.answered(sender, said)
            case Present() as said:
                self._table.present(sender, said)
            case Left(number):
                self._service.left(sender, number)
            case Written(lease):
                self._service.written(sender, lease)
            case Unwritten(lease):
                self._service.unwritten(sender, lease)
            case NextRequest() as said:
                self._service.next_request(sender, said)
            case Closed() as said:
                self._service.closed(sender, said)
            case Look() as said:
                self._lookup.asked(sender, said)
            case Found() as said:
                self._lookup.found(said)

    def unreachable(self, reference: str) -> None:
        """See `bus.Listener`; references are `a…` of questions, `l…` of leases."""
        number = int(reference[1:])
        if reference[0] == "a":
            self._relay.unreachable(number)
        else:
            self._service.unreachable(number)

    def entry(self, key: str, body: bytes, revision: int) -> None:
        """See `bus.Listener`."""
        self._table.saw(key, body, revision)

    def up(self) -> None:
        """See `bus.Listener`."""
        self._table.ring()

    def down(self) -> None:
        """See `bus.Listener`."""
        self._relay.down()

    def look(self) -> None:
        """Who was there and is not any more?"""
        living = frozenset(self._table.members())
        if not self._living <= living:
            self._relay.gone(living)
            self._service.gone(living)
        self._living = living
