"""Simulated legacy agents: unmodified agents of every generation, as far as a server can tell (wire-facts §1)."""

from shim.tools.agents.events import Callbacks, Event, Exchange, Outcome, What
from shim.tools.agents.generations import GENERATIONS
from shim.tools.agents.legacy import LegacyAgent, Profile
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
    "Outcome",
    "PollStyle",
    "Pool",
    "Profile",
    "Request",
    "Response",
    "Result",
    "What",
    "WireError",
]
