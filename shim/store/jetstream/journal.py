"""Records of the journal: what one commit writes, in one or several messages, and what is left of them at an opening.

A record counts once its last part is stored, unless a later record skips it. Records are redone, never undone: each
holds whole rows, so that doing them again in order ends where doing them once did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from shim.errors import StoreError
from shim.store.jetstream.layout import Kind, RowKey

# A row, or the absence of one.
Writes = Mapping[RowKey, bytes | None]
_ROOM_BYTES = 4096


class _Row(msgspec.Struct, array_like=True):
    kind: Kind
    first: str
    second: str
    value: msgspec.Raw


class Part(msgspec.Struct):
    """One message of the journal. `high` holds the highest numbers given so far, by table.

    `fence` is the writer's fencing token: who has a lower one must not take the store over any more.
    """

    writer: str
    record: str
    part: int = 0
    parts: int = 1
    skip: list[str] = []
    high: dict[str, int] = {}
    rows: list[_Row] = []
    fence: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Part).decode
_NULL = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Header:
    """What the parts of a record have in common."""

    writer: str
    record: str
    skip: tuple[str, ...] = ()
    high: dict[str, int] = field(default_factory=dict)
    fence: int = 0


def fits(key: RowKey, value: bytes | None, max_payload_bytes: int) -> bool:
    """Whether the server takes this row, in its own message and in a part of a record."""
    return _size(key, value) + _ROOM_BYTES <= max_payload_bytes


def _size(key: RowKey, value: bytes | None) -> int:
    # JSON may write each byte of a key as six.
    return 6 * (len(key.first.encode()) + len(key.second.encode())) + len(value or b"") + 32


def encode(header: Header, writes: Writes, max_payload_bytes: int) -> list[bytes]:
    """The messages of a record; each row must fit (`fits`)."""
    room = max_payload_bytes - _ROOM_BYTES
    groups: list[list[_Row]] = [[]]
    used = 0
    for key, value in writes.items():
        size = _size(key, value)
        if used + size > room and groups[-1]:
            groups.append([])
            used = 0
        used += size
        groups[-1].append(_Row(*key, _NULL if value is None else msgspec.Raw(value)))
    return [
        _encode(Part(header.writer, header.record, n, len(groups), list(header.skip), header.high, rows, header.fence))
        for n, rows in enumerate(groups)
    ]


def decode(body: bytes) -> Part:
    """Raises `StoreError`: a journal that cannot be read leaves open what was promised."""
    try:
        return _decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreError("the journal of the NATS store cannot be read") from error


@dataclass(frozen=True, slots=True)
class Redo:
    """What the journal still asks for: the last word on each row, and the highest numbers given."""

    writes: dict[RowKey, bytes | None]
    high: dict[str, int]


def redo(parts: Iterable[Part]) -> Redo:
    """Take complete records that nothing skips, in the order in which they were completed."""
    found = list(parts)
    skipped = {record for part in found for record in part.skip}
    begun: dict[str, list[Part]] = {}
    result = Redo({}, {})
    for part in found:
        for table, number in part.high.items():
            result.high[table] = max(number, result.high.get(table, 0))
        of_record = begun.setdefault(part.record, [])
        if part.part == len(of_record):
            of_record.append(part)
        if part.record in skipped or part.part + 1 != part.parts or len(of_record) != part.parts:
            continue
        for row in (row for each in begun.pop(part.record) for row in each.rows):
            value = bytes(row.value)
            result.writes[RowKey(row.kind, row.first, row.second)] = None if value == b"null" else value
    return result
