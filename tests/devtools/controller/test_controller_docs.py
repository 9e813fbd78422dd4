"""docs/reference/controller.md names every fault with its fields, every call and the options that it says it names."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from devtools.controller import command
from devtools.controller.active_faults import ActiveFaults
from devtools.controller.commands import CommandLog, CommandSpec
from devtools.controller.connections import Connections
from devtools.controller.control import Control
from devtools.controller.faults import AnyFault, Fault
from devtools.controller.history import History
from devtools.controller.legacy import LegacyApi
from devtools.controller.registry import Registry
from devtools.controller.state import ControllerState, Options, Tokens
from shim.clock import Clock

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "controller.md").read_text()


def _fields(struct: type[msgspec.Struct]) -> set[str]:
    return set(struct.__struct_fields__)


def test_every_fault_with_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", PAGE.split("## Faults")[1], re.MULTILINE)
    told = {kind: set(re.findall(r"`(\w+)`", fields)) for kind, fields in rows}
    assert told == {kind.__struct_config__.tag: _fields(kind) - _fields(Fault) for kind in AnyFault.__args__}
    assert {name for name in _fields(Fault) if f"`{name}`" not in PAGE} == set()


def test_every_call() -> None:
    clock = Clock()
    history = History(clock, max_events=1, max_bytes=1)
    state = ControllerState(clock, Options(), history, ActiveFaults(), Registry(clock), CommandLog())
    control = Control(Connections(state), LegacyApi(state, Tokens([])))
    calls = {f"{route.method} {route.path}" for route in control.routes()}
    told = set(re.findall(r"`((?:GET|POST|DELETE) /control/[^`?]*)`", PAGE))
    assert told == calls - {"GET /control"}
    assert {name for name in _fields(CommandSpec) if f"`{name}`" not in PAGE} == set()


def test_options_exist() -> None:
    there = {name for option in command.params for name in option.opts}
    assert set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) <= there | {"--help"}
