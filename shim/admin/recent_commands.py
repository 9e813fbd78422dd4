"""The last commands that something happened to, seen where every step of a command's life goes by: before the store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shim.core.records import AddTrace, Operation, SessionKey, StoreContents
from shim.ports import CommandStore, StoreDone

KEPT = 50


@dataclass(slots=True)
class RecentCommand:
    """A command's newest step. `type` and `arrived_wall` are unknown (`""`, 0) when it came before the start."""

    id: str
    session: SessionKey
    event: str
    detail: str
    wall: float
    type: str = ""
    arrived_wall: float = 0.0


class RecentCommandsStore:
    """A `ports.CommandStore` that hands everything on to another, and remembers."""

    def __init__(self, store: CommandStore) -> None:
        self._store = store
        self._recent: OrderedDict[tuple[SessionKey, str], RecentCommand] = OrderedDict()

    def __iter__(self) -> Iterator[RecentCommand]:
        """The newest first."""
        return iter(list(reversed(self._recent.values())))

    def open(self) -> StoreContents:
        """See `ports.CommandStore`."""
        return self._store.open()

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """See `ports.CommandStore`."""
        for operation in operations:
            if isinstance(operation, AddTrace):
                self._note(operation)
        self._store.submit(operations, done)

    def close(self) -> None:
        """See `ports.CommandStore`."""
        self._store.close()

    def _note(self, step: AddTrace) -> None:
        entry = step.entry
        for command_id in step.ids[-KEPT:]:
            known = self._recent.pop((step.session, command_id), None)
            recent = RecentCommand(command_id, step.session, entry.event, entry.detail, entry.wall)
            if entry.event == "arrived":
                recent.type, recent.arrived_wall = entry.detail, entry.wall
            elif known is not None:
                recent.type, recent.arrived_wall = known.type, known.arrived_wall
            self._recent[step.session, command_id] = recent
        while len(self._recent) > KEPT:
            self._recent.popitem(last=False)
