"""Connection to PostgreSQL in pipeline mode: queued statements are sent together and their results read together.

It uses psycopg's low-level `pq` interface, because psycopg's cursors cost more CPU time than the server does.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import psycopg
from psycopg import pq
from psycopg.pq import abc

from shim.clock import Clock

ANSWER_S = 10.0
monotonic = Clock().monotonic_s
_TICK_MS = 1000
_TEXT, _INT, _FLOAT, _BYTES, _BOOL = 25, 20, 701, 17, 16
_FORMATS = {_BYTES: 1}
# Columns of arrays: the type of the array, that of its elements, and for numbers their binary format.
_COLUMNS = {"t": (1009, _TEXT, ""), "i": (1016, _INT, "iq"), "f": (1022, _FLOAT, "id"), "b": (1001, _BYTES, "")}
_ARRAY_HEAD = struct.Struct("!iiIii").pack
_LENGTH = struct.Struct("!i").pack
_OIDS: dict[type, int] = {str: _TEXT, int: _INT, float: _FLOAT, bytes: _BYTES, bool: _BOOL}
_BINARY: dict[int, Callable[[bytes], Any]] = {
    _INT: lambda raw: struct.unpack("!q", raw)[0],
    23: lambda raw: struct.unpack("!i", raw)[0],
    _FLOAT: lambda raw: struct.unpack("!d", raw)[0],
    _BOOL: lambda raw: raw == b"\x01",
    _BYTES: bytes,
    1016: lambda raw: struct.unpack_from("!" + "iq" * ((len(raw) - 20) // 12), raw, 20)[1::2],  # bigint[] without NULL
}


_Key = tuple[str, tuple[int, ...]]  # a statement and the types of its parameters


class StatementError(Exception):
    """The server answered with an error. `state` is its SQLSTATE."""

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state


class ConnectionLost(Exception):
    """The connection was lost, or the server did not answer in time."""


class StatementResult:
    """Result of a statement. The first access sends all queued statements and waits for their results."""

    __slots__ = ("_decoders", "_next", "_pipeline", "result")

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._next = 0
        self._decoders: list[Callable[[bytes], Any]] | None = None
        self.result: abc.PGresult | None = None

    @property
    def rowcount(self) -> int:
        """Number of rows that the statement changed or returned."""
        return self._received().command_tuples or 0

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, or `None` after the last one."""
        result, row = self._received(), self._next
        if row >= result.ntuples:
            return None
        self._next = row + 1
        if self._decoders is None:
            self._decoders = [_BINARY.get(result.ftype(column), bytes.decode) for column in range(result.nfields)]
        value = result.get_value
        return tuple(
            [
                None if (raw := value(row, column)) is None else decode(raw)
                for column, decode in enumerate(self._decoders)
            ]
        )

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return all remaining rows."""
        rows = []
        while (row := self.fetchone()) is not None:
            rows.append(row)
        return rows

    def _received(self) -> abc.PGresult:
        if self.result is None:
            self._pipeline.sync()
        if self.result is None:
            raise ConnectionLost
        return self.result


class Pipeline:
    """Queue of statements on one connection, used by one thread.

    After `StatementError` the caller rolls the transaction back; after `ConnectionLost` it closes the pipeline.
    `waiting` is called each second during a wait for the server. An exception of `waiting` ends the wait.
    """

    def __init__(self, connection: psycopg.Connection[Any], waiting: Callable[[], None]) -> None:
        self._tick = waiting
        self.warned = False
        connection.add_notice_handler(self._on_notice)
        self._connection = connection
        self._server = connection.pgconn
        self._server.nonblocking = 1
        self._server.enter_pipeline_mode()
        self._poll = select.poll()
        self._poll.register(self._server.socket, select.POLLIN)
        # Names of prepared statements are never reused: after an error it is unknown which ones exist.
        self._names = 0
        self._prepared: dict[_Key, bytes] = {}
        self._new: list[_Key] = []
        self._waiting: list[StatementResult] = []
        self._limit_s = ANSWER_S

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> StatementResult:
        """Queue a statement. Its text must be a constant, because each text is prepared at first use and kept."""
        values: list[bytes | None] = []
        types: list[int] = []
        for value in parameters:
            oid = _OIDS[type(value)]
            types.append(oid)
            if oid == _TEXT:
                values.append(_encode(value))
            elif oid == _BYTES:
                values.append(value)
            else:
                values.append(str(value).encode())
        return self._send((statement, tuple(types)), values, [_FORMATS.get(oid, 0) for oid in types])

    def execute_columns(self, statement: str, kinds: str, rows: Sequence[Sequence[Any]]) -> StatementResult:
        """Queue a statement whose parameters are arrays, one for each column of `rows`.

        `kinds` has a letter for each column: `t` text, `i` integer, `f` float, `b` bytes. One array costs driver and
        server a fraction of what a parameter for each value costs, and any number of rows is the same statement.
        """
        values = [_array(kind, column) for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)]
        return self._send((statement, tuple(_COLUMNS[kind][0] for kind in kinds)), values, [1] * len(values))

    def _send(self, key: _Key, values: Sequence[bytes | None], formats: Sequence[int]) -> StatementResult:
        try:
            name = self._prepared.get(key) or self._prepare(key)
            self._server.send_query_prepared(name, values, formats, 1)
        except psycopg.Error as error:
            raise ConnectionLost from error
        answer = StatementResult(self)
        self._waiting.append(answer)
        return answer

    def _prepare(self, key: _Key) -> bytes:
        self._names += 1
        name = self._prepared[key] = b"s%d" % self._names
        self._new.append(key)
        self._server.send_prepare(name, key[0].replace("?", "$").encode(), key[1])
        self._waiting.append(StatementResult(self))
        return name

    def flush(self) -> None:
        """Send queued statements, as much as the socket accepts without blocking."""
        try:
            self._server.flush()
        except psycopg.Error as error:
            raise ConnectionLost from error

    def sync(self, limit_s: float = ANSWER_S) -> None:
        """Send the queued statements and read their results.

        Raises `StatementError` with the first error, and `ConnectionLost`, also if nothing arrives for `limit_s`.
        """
        waiting, self._waiting = self._waiting, []
        self._limit_s = limit_s
        refused = None
        try:
            self._server.pipeline_sync()
            for answer in waiting:
                while (result := self._next_result()) is not None:
                    answer.result = result
                    if result.status == pq.ExecStatus.FATAL_ERROR and refused is None:
                        refused = result
            if (end := self._next_result()) is None or end.status != pq.ExecStatus.PIPELINE_SYNC:
                raise ConnectionLost
        except psycopg.Error as error:
            raise ConnectionLost from error
        if refused is not None:
            for key in self._new:
                self._prepared.pop(key, None)
            self._new.clear()
            raise _refusal(refused)
        self._new.clear()

    def _next_result(self) -> abc.PGresult | None:
        if self._server.is_busy():
            self._communicate(monotonic() + self._limit_s)
        return self._server.get_result()

    def _communicate(self, until_s: float) -> None:
        server = self._server
        while True:
            pending = server.flush()
            self._poll.modify(server.socket, select.POLLIN | (select.POLLOUT if pending else 0))
            if self._poll.poll(_TICK_MS):
                server.consume_input()
            elif monotonic() < until_s:
                self._tick()
            else:
                raise ConnectionLost
            if not server.is_busy():
                return

    def _on_notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        self.warned = self.warned or diagnostic.severity_nonlocalized == "WARNING"

    def close(self) -> None:
        """Close the connection. Raises nothing."""
        self._connection.close()


def _refusal(result: abc.PGresult) -> Exception:
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    # An error without SQLSTATE comes from the driver: the connection broke. With 57P the server stops or ends this
    # backend; 08 are connection errors; 25P03 ends a session that was idle in a transaction.
    return StatementError(state) if state and not state.startswith(("57P", "08", "25P03")) else ConnectionLost()


def _encode(text: str) -> bytes:
    # PostgreSQL rejects NUL characters in text: replace each with the visible symbol for NUL.
    return (text.replace("\0", "␀") if "\0" in text else text).encode()


def _array(kind: str, column: Sequence[Any]) -> bytes:
    """Encode values as an array in PostgreSQL's binary format: a header, then length and bytes of each value."""
    _, oid, number = _COLUMNS[kind]
    head = _ARRAY_HEAD(1, 0, oid, len(column), 1)  # dimensions, has no NULL, type, number of elements, first index
    if number:
        lengths_and_values: list[Any] = [8] * (2 * len(column))
        lengths_and_values[1::2] = column
        return head + struct.pack(f"!{number * len(column)}", *lengths_and_values)
    raws = column if kind == "b" else list(map(_encode if "\0" in "".join(column) else str.encode, column))
    # Maps instead of loops: this is most of what a command costs this process.
    return head + b"".join(chain.from_iterable(zip(map(_LENGTH, map(len, raws)), raws, strict=True)))
