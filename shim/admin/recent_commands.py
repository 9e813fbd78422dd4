"""Recently changed commands, recorded by a store in front of the real one, which all steps of a command pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shim.core.records import AddTrace, Operation, SessionKey, StoreContents
from shim.ports import CommandStore, StoreDone

KEPT = 50


@dataclass(slots=True)
class RecentCommand:
    """The newest step of a command. `type` and `arrived_unix` are unknown (`""`, 0) if it arrived before the start."""

    id: str
    session: SessionKey
    event: str
    detail: str
    wall: float
    type: str = ""
    arrived_unix: float = 0.0


class RecentCommandsStore:
    """`ports.CommandStore` that forwards everything to another store and records the steps of commands."""

    def __init__(self, store: CommandStore) -> None:
        self._store = store
        self._recent: OrderedDict[tuple[SessionKey, str], RecentCommand] = OrderedDict()

    def __iter__(self) -> Iterator[RecentCommand]:
        """Iterate over the commands, the newest step first."""
        return iter(list(reversed(self._recent.values())))

    def open(self) -> StoreContents:
        """Open the store behind."""
        return self._store.open()

    def submit(self, operations: Sequence[Operation], done: StoreDone | None = None) -> None:
        """Record the steps among the operations, and forward them."""
        for operation in operations:
            if isinstance(operation, AddTrace):
                self._note(operation)
        self._store.submit(operations, done)

    def close(self) -> None:
        """Close the store behind."""
        self._store.close()

    def _note(self, step: AddTrace) -> None:
        entry = step.entry
        for command_id in step.ids[-KEPT:]:
            known = self._recent.pop((step.session, command_id), None)
            recent = RecentCommand(command_id, step.session, entry.event, entry.detail, entry.wall)
            if entry.event == "arrived":
                recent.type, recent.arrived_unix = entry.detail, entry.wall
            elif known is not None:
                recent.type, recent.arrived_unix = known.type, known.arrived_unix
            self._recent[step.session, command_id] = recent
        while len(self._recent) > KEPT:
            self._recent.popitem(last=False)
