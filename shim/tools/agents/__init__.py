"""Simulated legacy agents: unmodified agents of every generation, as far as a server can tell (wire-facts §1)."""

from shim.tools.agents.events import Callbacks, Event, Exchange, CallOutcome, EventKind
from shim.tools.agents.generations import GENERATIONS
from shim.tools.agents.legacy import LegacyAgent, AgentProfile
from shim.tools.agents.pace import PollStyle
from shim.tools.agents.replies import Command
from shim.tools.agents.shapes import Identity, Result
from shim.tools.agents.wire import Connection, Pool, Request, Response, WireError

__all__ = [
    "GENERATIONS",
    "Callbacks",
    "Command",
    "Connection",
    "Event",
    "Exchange",
    "Identity",
    "LegacyAgent",
    "CallOutcome",
    "PollStyle",
    "Pool",
    "AgentProfile",
    "Request",
    "Response",
    "Result",
    "EventKind",
    "WireError",
]
