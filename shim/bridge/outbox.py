"""Results on their way up: on disk first, sent in order, sent again until the controller has them (protocol.md §3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shim.bridge.connection import Connection
from shim.bridge.context import Context
from shim.core.records import AddTrace, CloseOutbox, OutboxEntry, PutOutbox, ReadOutbox, SessionKey, TraceEntry
from shim.core.sessions import Session
from shim.core.timestamps import rfc3339
from shim.errors import StoreError
from shim.logs import get

log = get(__name__)

PAGE = 32
WINDOW_BYTES = 8 * 1024 * 1024

Route = Callable[[SessionKey], Connection | None]


@dataclass(slots=True)
class _OnDisk:
    """An entry that the controller is not known to have; `sent_on` is a connection's serial, 0 = not sent there.

    `posted_at`: when the agent's result came, if the link was up then and it was not sent yet.
    """

    session: SessionKey
    command_id: str
    sent_on: int = 0
    size_bytes: int = 0
    posted_at: float | None = None


class Outbox:
    """All unconfirmed `command_result`s. In memory stand only their numbers; what they say is read when it is sent."""

    def __init__(self, ctx: Context, route: Route) -> None:
        self._ctx = ctx
        self._route = route
        self._entries: dict[int, _OnDisk] = {}
        self._pumping: dict[str, int] = {}  # owner -> last seq read
        self._again: set[str] = set()
        self._in_flight: dict[int, int] = {}  # connection serial -> bytes sent and not confirmed
        self._blocked: set[str] = set()
        self._unread: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def empty(self) -> bool:
        """Whether the controller has everything, what stands on disk from before included."""
        return not (self._entries or self._unread or self._pumping)

    def loaded(self, owners: tuple[str, ...]) -> None:
        """These owners have entries on disk from before."""
        self._unread.update(owners)

    def unsent_for(self, owner: str) -> bool:
        """Whether something of this owner was never sent at all."""
        return owner in self._unread or any(e.sent_on == 0 and e.session.owner == owner for e in self._entries.values())

    def added(self, entry: OutboxEntry, posted_at: float | None = None) -> None:
        """An entry has been committed: send it, unless a pump that reads the disk will come to it.

        `posted_at`: when the agent's result came, if the link was up then.
        """
        self._entries[entry.seq] = _OnDisk(entry.session, entry.command_id, posted_at=posted_at)
        if entry.session.owner not in self._pumping:
            self._send(entry)

    def online(self, owner: str) -> None:
        """A connection of this owner came up: read the disk and send what was not sent on it."""
        if owner in self._pumping:
            self._again.add(owner)
            return
        self._pumping[owner] = 0
        self._read(owner)

    def fenced(self, seqs: tuple[int, ...]) -> None:
        """The controller has these."""
        closed = {seq: entry for seq in seqs if (entry := self._entries.pop(seq, None)) is not None}
        for entry in closed.values():
            if entry.sent_on in self._in_flight:
                self._in_flight[entry.sent_on] -= entry.size_bytes
        wall = self._ctx.clock.wall_s()
        traces = [AddTrace(entry.session, (entry.command_id,), TraceEntry(wall, "closed")) for entry in closed.values()]

        def done(outcome: list[Any] | StoreError) -> None:
            if isinstance(outcome, StoreError):
                # Still on disk: it will be sent once more after the next connect, which is allowed.
                self._entries.update(closed)

        self._ctx.store.submit([CloseOutbox(tuple(closed), wall), *traces], done)
        for entry in closed.values():
            self._ctx.metrics.commands.labels("closed").inc()
            log.info("result_closed", command=entry.command_id, session=entry.session.ident)
        for owner in list(self._blocked):
            self._blocked.discard(owner)
            self.online(owner)

    def resend(self, key: SessionKey, command_id: str, request_id: str, payload: dict[str, Any]) -> None:
        """The controller sent a command again whose result is on disk: it wants that result."""
        outstanding = any(e.command_id == command_id and e.session == key for e in self._entries.values())
        if not outstanding:
            self._ctx.store.submit(
                [PutOutbox(key, command_id, request_id, payload)],
                lambda outcome: None if isinstance(outcome, StoreError) else self.added(outcome[0]),
            )

    def offline(self, connection: Connection) -> None:
        """The connection is no more: what it carried unconfirmed will be sent on the next."""
        self._in_flight.pop(connection.serial, None)

    def report(self, key: SessionKey, session: Session | None, command_id: str, request_id: str, **fields: Any) -> None:
        """Tell the controller that a command ended without its agent's result: `code` and `error` are in `fields`.

        On disk first; where the disk refuses, straight to the connection: better told once than not at all.
        """
        payload = self.failure(key, session, command_id, **fields)
        wall = self._ctx.clock.wall_s()
        trace = AddTrace(key, (command_id,), TraceEntry(wall, "reported", str(fields.get("code", ""))))

        def done(outcome: list[Any] | StoreError) -> None:
            if isinstance(outcome, StoreError):
                connection = self._route(key)
                if connection is not None:
                    connection.send("command_result", payload, request_id)
            else:
                self.added(outcome[0])

        self._ctx.store.submit([PutOutbox(key, command_id, request_id, payload), trace], done)

    def failure(self, key: SessionKey, session: Session | None, command_id: str, **fields: Any) -> dict[str, Any]:
        """The payload of a `command_result` that the shim itself makes."""
        payload: dict[str, Any] = {"command_id": command_id}
        if session is not None:
            payload["cluster_id"] = session.upstream_cluster_id
            payload["agent_id"] = session.agent_id
        payload["success"] = False
        payload.update(fields)
        payload["timestamp"] = rfc3339(self._ctx.clock.wall_s())
        return payload

    # --- the pump -----------------------------------------------------------------------------------------------------

    def _read(self, owner: str) -> None:
        after = self._pumping[owner]
        self._ctx.store.submit([ReadOutbox(owner, after, PAGE)], lambda outcome: self._page(owner, outcome))

    def _page(self, owner: str, outcome: list[Any] | StoreError) -> None:
        page: list[OutboxEntry] = [] if isinstance(outcome, StoreError) else outcome[0]
        if isinstance(outcome, StoreError):
            log.warning("outbox_unreadable", error=str(outcome))
            self._ctx.timers.call_later(5.0, lambda: self.online(owner))
        for entry in page:
            self._entries.setdefault(entry.seq, _OnDisk(entry.session, entry.command_id))
            self._send(entry)
        if len(page) == PAGE:
            self._pumping[owner] = page[-1].seq
            self._read(owner)
            return
        del self._pumping[owner]
        if not isinstance(outcome, StoreError):
            self._unread.discard(owner)
        if owner in self._again:
            self._again.discard(owner)
            self.online(owner)

    def _send(self, entry: OutboxEntry) -> None:
        connection = self._route(entry.session)
        known = self._entries.get(entry.seq)
        if connection is None or known is None or known.sent_on == connection.serial:
            return
        in_flight = self._in_flight.get(connection.serial, 0)
        if in_flight >= WINDOW_BYTES:
            self._blocked.add(entry.session.owner)
            return
        known.sent_on = connection.serial
        known.size_bytes = sum(len(v) for v in entry.payload.values() if isinstance(v, str)) + 512
        self._in_flight[connection.serial] = in_flight + known.size_bytes
        connection.send_result(entry.seq, entry.request_id, self._fitting(entry.payload))
        if known.posted_at is not None:
            self._ctx.metrics.message_seconds.labels("up").observe(self._ctx.now - known.posted_at)
            known.posted_at = None

    def _fitting(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The controller's limit is `upstream.max_send_bytes`: a longer output is cut and says so."""
        limit = self._ctx.settings.upstream.max_send_bytes
        texts = [key for key in ("output", "error") if isinstance(payload.get(key), str)]
        size = sum(len(payload[key]) for key in texts)
        budget = max(limit - 65_536, 1024)
        if size <= budget // 6:  # even if every character is escaped
            return payload
        cut = dict(payload)
        for key in texts:
            data = payload[key].encode("utf-8", "replace")
            if len(data) > budget // 2:
                cut[key] = data[: budget // 2].decode("utf-8", "ignore")
                cut["metadata"] = {**(payload.get("metadata") or {}), f"{key}_truncated_bytes": len(data) - budget // 2}
        return cut
