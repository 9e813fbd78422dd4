"""Faults that are set, and the decision if one applies to an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from devtools.controller.faults import AnyFault, Endpoint, Fault
from shim.errors import OperatorError

F = TypeVar("F", bound=Fault)


@dataclass(frozen=True, slots=True)
class Scope:
    """Context of an event: endpoint, connection (0: none yet), the agents on the connection, and the message's type."""

    endpoint: Endpoint
    connection: int = 0
    agents: Collection[str] = ()
    type: str = ""


@dataclass(slots=True)
class ActiveFault:
    """A fault that is set. `left` is the remainder of its count, `shown` the number of times that it was applied.

    `connections_before`: connections with lower numbers were open when the fault started.
    """

    id: int
    fault: AnyFault
    left: int | None
    started: bool = False
    shown: int = 0
    connections_before: int = 0
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the fault as the control API shows it."""
        shown: dict[str, Any] = msgspec.to_builtins(self.fault)
        return shown | {"id": self.id, "started": self.started, "left": self.left, "shown": self.shown}


def parse_fault(value: Any) -> AnyFault:
    """Parse a fault from its JSON object. Raises `OperatorError` 400 that names the place of the mistake."""
    try:
        fault: AnyFault = msgspec.convert(value, AnyFault, strict=True)
    except msgspec.ValidationError as error:
        raise OperatorError(400, f"no such fault: {error}") from None
    if fault.count is not None and not fault.counted:
        raise OperatorError(400, f"count has no meaning for {type(fault).__struct_config__.tag}")
    return fault


class ActiveFaults:
    """The set of faults. `on_start` is called when a fault becomes active, `on_end` when a fault that was set ends."""

    def __init__(self) -> None:
        self.on_start: Callable[[ActiveFault], None] = lambda _entry: None
        self.on_end: Callable[[ActiveFault], None] = lambda _entry: None
        self._set: dict[int, ActiveFault] = {}
        self._last_id = 0

    def add(self, fault: AnyFault) -> int:
        """Set a fault and return its id. Runs on the event loop."""
        self._last_id += 1
        entry = ActiveFault(self._last_id, fault, fault.count)
        self._set[entry.id] = entry
        if fault.after_s:
            entry.timers.append(asyncio.get_running_loop().call_later(fault.after_s, self._start, entry))
        else:
            self._start(entry)
        return entry.id

    def _start(self, entry: ActiveFault) -> None:
        entry.started = True
        if entry.fault.duration_s is not None:
            loop = asyncio.get_running_loop()
            entry.timers.append(loop.call_later(entry.fault.duration_s, self.clear, entry.id))
        self.on_start(entry)

    def clear(self, fault_id: int) -> bool:
        """End a fault; return False if there is no fault with this id."""
        entry = self._set.pop(fault_id, None)
        if entry is None:
            return False
        for timer in entry.timers:
            timer.cancel()
        self.on_end(entry)
        return True

    def clear_all(self) -> int:
        """End all faults and return their number."""
        ids = list(self._set)
        for fault_id in ids:
            self.clear(fault_id)
        return len(ids)

    def all(self) -> list[ActiveFault]:
        """Return the faults that are set, oldest first."""
        return list(self._set.values())

    def peek(self, kind: type[F], scope: Scope) -> F | None:
        """Return the oldest fault of this kind that applies to the context, without counting it."""
        entry = self._find(kind, scope)
        return entry.fault if entry and isinstance(entry.fault, kind) else None

    def take(self, kind: type[F], scope: Scope) -> F | None:
        """Return the same fault as `peek` and count it. A fault ends when its count is used up."""
        entry = self._find(kind, scope)
        if entry is None or not isinstance(entry.fault, kind):
            return None
        entry.shown += 1
        if entry.left is not None:
            entry.left -= 1
            if entry.left == 0:
                self.clear(entry.id)
        return entry.fault

    def _find(self, kind: type[F], scope: Scope) -> ActiveFault | None:
        return next((entry for entry in self._set.values() if _shows(entry, kind, scope)), None)


def _shows(entry: ActiveFault, kind: type[Fault], scope: Scope) -> bool:
    fault = entry.fault
    if not entry.started or not isinstance(fault, kind):
        return False
    if not getattr(fault, "new_connections", True) and scope.connection >= entry.connections_before:
        return False
    types = getattr(fault, "types", ())
    on = getattr(fault, "on", "")
    return (
        (fault.endpoint is None or fault.endpoint is scope.endpoint)
        and (fault.connection is None or fault.connection == scope.connection)
        and (fault.agent_id is None or fault.agent_id in scope.agents)
        and (not types or scope.type in types)
        and (not on or scope.type == on)
    )
