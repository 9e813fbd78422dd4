"""State shared by all parts of one controller.

A module that serves an API has `routes(hub)` and uses this state.
"""

from __future__ import annotations

from dataclasses import dataclass

from devtools.controller.active_faults import ActiveFaults
from devtools.controller.commands import CommandLog
from devtools.controller.history import History
from devtools.controller.options import Options
from devtools.controller.registry import Registry
from shim.clock import Clock


@dataclass(frozen=True, slots=True)
class ControllerState:
    """State of a controller, apart from its connections."""

    clock: Clock
    options: Options
    history: History
    faults: ActiveFaults
    registry: Registry
    commands: CommandLog
