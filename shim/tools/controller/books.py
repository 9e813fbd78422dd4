"""What all parts of one controller share. An API of it is a module with `routes(hub)` on top of this."""

from __future__ import annotations

from dataclasses import dataclass

from shim.clock import Clock
from shim.tools.controller.commands import CommandLog
from shim.tools.controller.faultbook import ActiveFaults
from shim.tools.controller.history import History
from shim.tools.controller.options import Options
from shim.tools.controller.registry import Registry


@dataclass(frozen=True, slots=True)
class ControllerState:
    """The state of a controller, apart from its connections."""

    clock: Clock
    options: Options
    history: History
    faults: ActiveFaults
    registry: Registry
    commands: CommandLog
