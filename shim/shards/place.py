"""Where the parts of a replica stand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from shim.composition import Spawn
from shim.core.leases import LeasePolicy
from shim.ports import Clock, Timers


@dataclass(frozen=True, slots=True)
class Place:
    """`process` and `name` are this replica's; `numbers` are never given twice by this process."""

    process: str
    name: str
    policy: LeasePolicy
    clock: Clock
    timers: Timers
    spawn: Spawn
    numbers: count[int]
