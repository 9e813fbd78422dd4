"""Legacy HTTP dialects: pure translation of agents' calls, one module per family of routes.

The routes are in docs/reference/protocol.md#1-legacy-side. A dialect is one module of this package with

    NAME: str
    ROUTES: tuple[Route, ...]
    def parse(operation: str, call: Call) -> AgentCall      # raises errors.AgentError
    def render(operation: str, outcome: Outcome, call: Call) -> Reply

Dialects are found by their module name, so a new dialect is one new file. The module `_shared` is no
dialect: it has the code that dialects share. `shim.agent_api.admission` finds the dialect of a request.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from shim.core.agent_calls import AgentCall, Failed, Outcome


class Call(msgspec.Struct, frozen=True):
    """One decoded legacy request. `params` has the ids of the path, `body` the JSON value (`None` if empty).

    `size_bytes` is the size of the body after decompression. `shallow` is true if the body has too few brackets to be
    nested too deeply, so that the dialect need not check.
    """

    params: Mapping[str, str]
    body: Any = None
    user_agent: str = ""
    shallow: bool = False
    size_bytes: int = 0

    def __repr__(self) -> str:
        return f"Call({self.params!r}, user_agent={self.user_agent!r})"


class Reply(msgspec.Struct, frozen=True):
    """A reply: a status and a JSON object, or no body (`None`)."""

    status: int
    body: dict[str, Any] | None = None
    retry_after_s: int | None = None


class Route(msgspec.Struct, frozen=True):
    """One legacy route. `pattern` has `{name}` segments; `operation` is passed to `parse` and `render`.

    `large` allows bodies up to `listen.max_status_body_bytes`. `open` routes need no Authorization header.
    """

    method: str
    pattern: str
    operation: str
    large: bool = False
    open: bool = False


class Dialect(Protocol):
    """The interface of a dialect module."""

    NAME: str
    ROUTES: tuple[Route, ...]

    def parse(self, operation: str, call: Call) -> AgentCall:
        """Convert a request to a call. Raises `AgentError` (400) for a malformed request."""

    def render(self, operation: str, outcome: Outcome, call: Call) -> Reply:
        """Convert an outcome, `Failed` included, to this generation's reply."""


def load() -> tuple[Dialect, ...]:
    """Return all dialects of this package, ordered by name."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)


def error_reply(failed: Failed) -> Reply:
    """Return an error in the shape of every legacy reply. A conflict has the ids in both places that agents read."""
    body: dict[str, Any] = {"success": False, "error": failed.error}
    if failed.cluster_id:
        body |= {"cluster_id": failed.cluster_id, "cluster": {"id": failed.cluster_id}}
    return Reply(failed.status, body, failed.retry_after_s)


class Match(msgspec.Struct, frozen=True):
    """A routed request. `params` has the ids of the path; `ident` is the one of them that names the agent, or empty."""

    dialect: Dialect
    route: Route
    params: dict[str, str]
    ident: str = ""
