"""One request on its way through the frontend."""

from __future__ import annotations

from typing import cast

from aiohttp import web

from shim.core.calls import AgentCall, PollCall
from shim.dialects import Match
from shim.frontend.connection import AgentConnection
from shim.ports import DeliveryReceipt


class RequestContext:
    """One request on its way through; `step` is where it is, in words of the metric `bad_requests`.

    `arrived_s` is a moment before which it did not arrive. `body` was read already, to be sent to another replica.
    """

    __slots__ = (
        "arrived_s",
        "body",
        "connection",
        "lease",
        "match",
        "more",
        "must_close",
        "request",
        "session",
        "started_s",
        "step",
    )

    def __init__(self, request: web.BaseRequest) -> None:
        self.request = request
        self.connection = cast("AgentConnection", request.protocol)
        self.started_s, self.arrived_s = self.connection.arrival(self.connection.begin_request())
        self.body: bytes | None = None
        self.match: Match | None = None
        self.lease: DeliveryReceipt | None = None
        self.session: tuple[str, str] | None = None  # whose request it is, once it is counted among those in flight
        self.step = "guard"
        self.more = ""
        self.must_close = False

    def moment(self, call: AgentCall) -> float:
        """Return what the switchboard reckons a call's time from: a poll's evidence must not be older than it is."""
        return self.arrived_s if isinstance(call, PollCall) else self.started_s

    @property
    def place(self) -> tuple[str, str]:
        """Dialect and operation, empty where no route matched."""
        match = self.match
        return ("", "") if match is None else (match.dialect.NAME, match.route.operation)
