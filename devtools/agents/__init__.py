"""Simulated legacy agents of every dialect (docs/reference/legacy-agents.md#1-legacy-http-endpoints)."""

from devtools.agents.agent import AgentProfile, LegacyAgent
from devtools.agents.events import Callbacks, CallOutcome, Event, EventKind, Exchange
from devtools.agents.generations import GENERATIONS
from devtools.agents.http_client import Connection, Pool, Request, Response, WireError
from devtools.agents.pacing import PollStyle
from devtools.agents.replies import Command
from devtools.agents.requests import Identity, Result

__all__ = [
    "GENERATIONS",
    "AgentProfile",
    "CallOutcome",
    "Callbacks",
    "Command",
    "Connection",
    "Event",
    "EventKind",
    "Exchange",
    "Identity",
    "LegacyAgent",
    "PollStyle",
    "Pool",
    "Request",
    "Response",
    "Result",
    "WireError",
]
