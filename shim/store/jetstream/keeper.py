"""Rows on their way into JetStream: first the journal, then each row where it stands.

A commit is one record of the journal. It is the truth from the moment its last message is stored; the rows follow, and
where a crash comes between, the next opening writes them. Every append names the sequence that it expects to follow
(`Nats-Expected-Last-Sequence`), every row the revision that it replaces: of two writers the older is fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from shim.errors import StoreError
from shim.store.jetstream import images, journal
from shim.store.jetstream.images import Image, UnreadableRow
from shim.store.jetstream.journal import Header, Part
from shim.store.jetstream.layout import Kind, Layout, RowKey
from shim.store.jetstream.server import Conflict, Server, Stored, Unavailable
from shim.store.rows import encode_json

BACKOFF_S = 0.25
PURGE_EVERY = 64
_AT_ONCE = 64


class Fenced(StoreError):
    """Another writer has taken the store over, or the streams are not those that were opened. It does not pass."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a store held: its rows, the highest numbers given, and how many messages are no rows."""

    rows: list[Image]
    high: dict[str, int]
    unreadable: int


class Keeper:
    """The streams of one store. Methods wait as long as it takes: the caller sets the limit (`asyncio.timeout`)."""

    def __init__(self, server: Server, layout: Layout, replicas: int) -> None:
        self._server = server
        self._layout = layout
        self._replicas = replicas
        self._writer = uuid.uuid4().hex
        self._last = 0
        self._skip: set[str] = set()
        self._revisions: dict[RowKey, int] = {}
        self._pending: dict[RowKey, tuple[bytes | None, str]] = {}
        self._record_first = 0
        self._unpurged = 0
        self._opening = True
        self._fenced: Fenced | None = None

    @property
    def max_payload_bytes(self) -> int:
        return self._server.max_payload_bytes

    @property
    def is_behind(self) -> bool:
        """Whether rows of something committed are still to be written."""
        return bool(self._pending)

    # --- opening ------------------------------------------------------------------------------------------------------

    async def open(self) -> Taken:
        """Take the store over."""
        self._revisions.clear()
        self._pending.clear()
        await self._server.connect()
        await self._server.ensure(self._layout.configurations(self._replicas))
        self._last = await self._server.last_sequence(self._layout.journal)
        # From here on no append of an earlier writer is taken any more, and the journal says all that it had committed.
        await self._append(Header(self._writer, uuid.uuid4().hex), {})
        parts = [journal.decode(each.body) for each in await self._server.read(self._layout.journal, self._last)]
        unfinished = journal.redo(parts)
        rows, unreadable = await self._rows()
        for number, (key, value) in enumerate(unfinished.writes.items()):
            kept = rows.get(key)
            if value != (kept[1] if kept else None):
                self._pending[key] = (value, f"{self._writer}.{number}")
        await self.settle()
        found = [image for key, (image, _) in rows.items() if key not in unfinished.writes]
        found += [images.decode(key.kind, value) for key, value in unfinished.writes.items() if value is not None]
        self._opening = False
        return Taken(found, unfinished.high, unreadable)

    async def _rows(self) -> tuple[dict[RowKey, tuple[Image, bytes]], int]:
        rows: dict[RowKey, tuple[Image, bytes]] = {}
        unreadable = 0
        streams = self._layout.rows
        found = await asyncio.gather(*map(self._all_of, streams), return_exceptions=True)
        for stream, messages in zip(streams, found, strict=True):
            if isinstance(messages, BaseException):
                raise messages
            marker = self._layout.marker(stream)
            for message in messages:
                if message.subject == marker:
                    continue
                try:
                    image = images.decode(self._kind(stream, message), message.body)
                except UnreadableRow:
                    unreadable += 1
                    continue
                if self._layout.subject(image.key) != message.subject:
                    unreadable += 1
                    continue
                rows[image.key] = image, message.body
                self._revisions[image.key] = message.seq
        return rows, unreadable

    async def _all_of(self, stream: str) -> list[Stored]:
        return await self._server.read(stream, await self._mark(self._layout.marker(stream)))

    async def _mark(self, subject: str) -> int:
        """The sequence of a mark: its stream's leader has everything that was acknowledged before."""
        while True:
            try:
                return await self._server.publish(subject, encode_json({"writer": self._writer}), {})
            except Unavailable:
                await self._pause()

    def _kind(self, stream: str, message: Stored) -> Kind:
        if stream == self._layout.commands:
            return Kind.COMMAND
        if stream == self._layout.outbox:
            return Kind.OUTBOX
        try:
            return Kind(message.subject.split(".")[2])
        except (ValueError, IndexError):
            raise UnreadableRow("no kind of row") from None

    # --- committing ---------------------------------------------------------------------------------------------------

    def needed(self, writes: journal.Writes) -> dict[RowKey, bytes | None]:
        """Without deletions of what is not there."""
        return {key: value for key, value in writes.items() if value is not None or key in self._revisions}

    async def commit(self, writes: journal.Writes, high: dict[str, int]) -> None:
        """Make these rows the truth; `settle` writes them afterwards. Only while nothing is pending.

        When it is cut off, nothing was committed as far as this store is concerned: should the record have been stored
        all the same, the next one takes it back.
        """
        header = Header(self._writer, uuid.uuid4().hex, high=high)
        await self._append(header, writes)
        self._skip.clear()
        self._pending = {key: (value, f"{header.record}.{n}") for n, (key, value) in enumerate(writes.items())}

    async def _append(self, header: Header, writes: journal.Writes) -> None:
        await self._reach()
        first, number = 0, 0
        while True:
            whole = Header(header.writer, header.record, tuple(sorted(self._skip)), header.high)
            bodies = journal.encode(whole, writes, self.max_payload_bytes)
            if number == len(bodies):
                break
            seq = await self._append_one(bodies[number], header.record, number)
            if seq:
                first = first or seq
                number += 1
        self._record_first = first
        self._unpurged += 1

    async def _append_one(self, body: bytes, record: str, number: int) -> int:
        """The sequence of the message, 0 if it is to be tried again."""
        headers = {"Nats-Msg-Id": f"{record}.{number}", "Nats-Expected-Last-Sequence": str(self._last)}
        try:
            seq = await self._server.publish(self._layout.journal_subject, body, headers)
        except Unavailable:
            await self._pause()
            return 0
        except Conflict:
            try:
                return await self._catch_up(record, number)
            except Unavailable:
                await self._pause()
                return 0
        if seq <= self._last:
            raise self._fence("the journal is not the one that was opened")
        self._last = seq
        return seq

    async def _catch_up(self, record: str, number: int) -> int:
        """Read what stands behind the last known message: our own, reported as failed, or another writer's."""
        newest = await self._server.last_sequence(self._layout.journal)
        if newest < self._last:
            raise self._fence("the journal is not the one that was opened")
        if newest == self._last:
            await self._pause()
        if self._opening:
            # Not ours yet: somebody else was quicker.
            self._last = newest
            return 0
        for seq in range(self._last + 1, newest + 1):
            stored = await self._server.message(self._layout.journal, seq=seq)
            part = journal.decode(stored.body) if stored is not None else Part("", "")
            if part.writer != self._writer:
                raise self._fence("another shim has taken the store over")
            self._last = seq
            if (part.record, part.part) == (record, number):
                return seq
            self._skip.add(part.record)
        return 0

    # --- rows ---------------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Write the rows of what was committed, and shorten the journal from time to time."""
        while self._pending:
            await self._reach()
            keys = list(self._pending)
            for start in range(0, len(keys), _AT_ONCE):
                failures = await _all(self._write(key) for key in keys[start : start + _AT_ONCE])
                lasting = [each for each in failures if not isinstance(each, Unavailable)]
                if lasting:
                    raise lasting[0]
            if self._pending:
                await self._pause()
        if self._unpurged >= PURGE_EVERY:
            with contextlib.suppress(StoreError):  # the next time will do
                await self.purge()

    async def purge(self) -> None:
        """Forget records whose rows are written. The last one stays: it knows the highest numbers."""
        await self._server.purge(self._layout.journal, before=self._record_first)
        self._unpurged = 0

    async def _write(self, key: RowKey) -> None:
        value, message_id = self._pending[key]
        if value is not None:
            await self._put(key, value, message_id)
        elif key in self._revisions:
            await self._server.delete(self._layout.stream(key), self._revisions[key])
            del self._revisions[key]
        del self._pending[key]

    async def _put(self, key: RowKey, value: bytes, message_id: str) -> None:
        subject = self._layout.subject(key)
        expected = str(self._revisions.get(key, 0))
        headers = {"Nats-Msg-Id": message_id, "Nats-Expected-Last-Subject-Sequence": expected}
        try:
            self._revisions[key] = await self._server.publish(subject, value, headers)
        except Unavailable:
            # The revision keeps it from being written twice; the id might be held by a leader that is none any more.
            self._pending[key] = (value, uuid.uuid4().hex)
            raise
        except Conflict:
            there = await self._server.message(self._layout.stream(key), subject=subject)
            if there is not None and there.body == value:
                self._revisions[key] = there.seq
            elif self._opening:
                # The last breath of an earlier writer.
                self._revisions[key] = there.seq if there is not None else 0
                raise Unavailable("a row was written meanwhile") from None
            else:
                raise self._fence("another writer has changed a row") from None

    # ------------------------------------------------------------------------------------------------------------------

    def _fence(self, reason: str) -> Fenced:
        self._fenced = Fenced(reason)
        return self._fenced

    async def _reach(self) -> None:
        """Wait for a connection."""
        if self._fenced is not None:
            raise self._fenced
        while True:
            try:
                await self._server.connect()
            except Unavailable:
                await asyncio.sleep(BACKOFF_S)
            else:
                return

    async def _pause(self) -> None:
        await asyncio.sleep(BACKOFF_S)
        await self._reach()


async def _all(writes: Any) -> list[StoreError]:
    """Carry out coroutines side by side; what failed of them."""
    coroutines: list[Coroutine[Any, Any, None]] = list(writes)
    outcomes = await asyncio.gather(*coroutines, return_exceptions=True)
    failures = [each for each in outcomes if isinstance(each, BaseException)]
    for each in failures:
        if not isinstance(each, StoreError):
            raise each
    return [each for each in failures if isinstance(each, StoreError)]
