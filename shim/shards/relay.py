"""The asking side: an agent's call goes to the replica that owns its link, and evidence of delivery follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import count

from shim.core.calls import Failed
from shim.logs import get
from shim.ports import Answer, Client
from shim.shards.bus import Bus
from shim.shards.table import Table
from shim.shards.wire import (
    Answered,
    AnyCall,
    AnyMessage,
    Ask,
    Closed,
    Left,
    NextRequest,
    Unwritten,
    WireError,
    Written,
    encode,
    pack,
    token_bytes,
    unpack_outcome,
)

log = get(__name__)


class Miss(Enum):
    """Why there is no answer."""

    NOT_THERE = "not there"  # nothing has happened: it may be asked again
    LOST = "lost"  # it may have been carried out


@dataclass(frozen=True, slots=True)
class Asked:
    """Whom to ask, for which shard; after `limit_s` the answer counts as lost."""

    process: str
    shard: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class RemoteLease:
    """A `ports.Lease` that another replica knows."""

    process: str
    number: int
    connection: int


@dataclass(frozen=True, slots=True)
class _Pending:
    process: str
    answered: asyncio.Future[Answer | Miss]


class Relay:
    """Calls under way to other replicas. `me` names this process."""

    def __init__(self, bus: Bus, table: Table, me: str, numbers: count[int]) -> None:
        self._bus = bus
        self._table = table
        self._me = me
        self._numbers = numbers
        self._pending: dict[int, _Pending] = {}
        self._carriers: dict[int, set[str]] = {}

    def __len__(self) -> int:
        """How many calls are under way."""
        return len(self._pending)

    async def ask(self, asked: Asked, client: Client, call: AnyCall, arrived_s: float) -> Answer | Miss:
        """Have a call carried out there. Cancelled when the agent hangs up."""
        process, shard = asked.process, asked.shard
        number = next(self._numbers)
        try:
            kind, body = pack(call)
            arrived = self._table.in_terms_of(process, arrived_s)
            token = token_bytes(client.token)
            messages = self._encode(Ask(number, shard, token, client.connection, arrived, kind, body))
        except WireError as error:
            return Answer(Failed(413, str(error)))
        if not self._bus.is_up:
            return Miss.NOT_THERE
        pending = _Pending(process, asyncio.get_running_loop().create_future())
        self._pending[number] = pending
        self._bus.post(process, messages, f"a{number}")
        try:
            async with asyncio.timeout(asked.limit_s):
                answer = await pending.answered
        except TimeoutError:
            self._give_up(number, pending)
            return Miss.LOST
        except asyncio.CancelledError:
            self._give_up(number, pending)
            raise
        finally:
            self._pending.pop(number, None)
        if isinstance(answer, Answer) and isinstance(answer.lease, RemoteLease):
            lease = RemoteLease(process, answer.lease.number, client.connection)
            return Answer(answer.outcome, lease)
        return answer

    def _give_up(self, number: int, pending: _Pending) -> None:
        """The agent is gone; an answer may be just there."""
        answer = pending.answered.result() if pending.answered.done() and not pending.answered.cancelled() else None
        if answer is None:
            self._say(pending.process, Left(number))
        elif isinstance(answer, Answer) and isinstance(answer.lease, RemoteLease):
            self._say(pending.process, Unwritten(answer.lease.number))

    # --- what comes back ----------------------------------------------------------------------------------------------

    def answered(self, sender: str, said: Answered) -> None:
        """An answer came in."""
        self._table.heard(sender, said.clock)
        pending = self._pending.get(said.number)
        if pending is None or pending.process != sender or pending.answered.done():
            if said.lease:
                self._say(sender, Unwritten(said.lease))
            return
        if not said.kind:
            pending.answered.set_result(Miss.NOT_THERE)
            return
        try:
            outcome = unpack_outcome(said.kind, said.body)
        except WireError as error:
            log.error("relay_unreadable", error=str(error))
            if said.lease:
                self._say(sender, Unwritten(said.lease))
            pending.answered.set_result(Miss.LOST)
            return
        lease = RemoteLease(sender, said.lease, 0) if said.lease else None
        pending.answered.set_result(Answer(outcome, lease))

    def unreachable(self, number: int) -> None:
        """Nobody was there to take the question."""
        self._end(lambda each: each is self._pending.get(number), Miss.NOT_THERE)

    def down(self) -> None:
        """The connection to NATS was lost: answers may be, too."""
        self._end(lambda _: True, Miss.LOST)

    def gone(self, living: frozenset[str]) -> None:
        """Only these replicas live."""
        self._end(lambda each: each.process not in living, Miss.LOST)

    def _end(self, meant: Callable[[_Pending], bool], miss: Miss) -> None:
        for pending in list(self._pending.values()):
            if meant(pending) and not pending.answered.done():
                pending.answered.set_result(miss)

    # --- evidence -----------------------------------------------------------------------------------------------------

    def written(self, lease: RemoteLease) -> None:
        """See `ports.Switchboard.written`."""
        self._carriers.setdefault(lease.connection, set()).add(lease.process)
        self._say(lease.process, Written(lease.number))

    def unwritten(self, lease: RemoteLease) -> None:
        """See `ports.Switchboard.unwritten`."""
        self._say(lease.process, Unwritten(lease.number))

    def next_request(self, connection: int) -> None:
        """See `ports.Switchboard.next_request`."""
        for process in self._carriers.pop(connection, ()):
            self._say(process, NextRequest(connection))

    def connection_closed(self, connection: int, clean: bool) -> None:
        """See `ports.Switchboard.connection_closed`."""
        for process in self._carriers.pop(connection, ()):
            self._say(process, Closed(connection, clean))

    def _say(self, process: str, said: AnyMessage) -> None:
        self._bus.post(process, self._encode(said))

    def _encode(self, said: AnyMessage) -> list[bytes]:
        return encode(self._me, said, next(self._numbers), self._bus.max_payload_bytes)
