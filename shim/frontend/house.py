"""What all connections of one frontend share."""

from __future__ import annotations

from dataclasses import dataclass, field

from shim.frontend.limits import Budget
from shim.frontend.refused import RefusedCalls
from shim.frontend.replies import Replies
from shim.metrics import Metrics
from shim.ports import Switchboard
from shim.settings import Listen


@dataclass(slots=True)
class Doors:
    """How many connections are open."""

    open: int = 0


@dataclass(frozen=True, slots=True)
class House:
    """What all connections of one frontend share."""

    listen: Listen
    switchboard: Switchboard
    metrics: Metrics
    replies: Replies
    budget: Budget
    refused: RefusedCalls
    doors: Doors = field(default_factory=Doors)
