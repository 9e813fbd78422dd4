"""Whole responses of the legacy API as bytes, without aiohttp's response objects, and records of refused calls."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from shim.core.call_records import RecentCalls
from shim.log import get
from shim.protocol.dialects import Match, Reply

StaticHeaders = Callable[[], Mapping[str, str]]

_SANE_ID = re.compile(r"[A-Za-z0-9._:@/+=\-]{1,128}", re.ASCII)
_UNFIT = re.compile(r"[^\t\x20-\x7e]+")
_NO_HEADERS: Mapping[str, str] = {}

encode_body: Callable[[Any], bytes] = msgspec.json.Encoder().encode
log = get(__name__)
NO_ROUTE = "a request without a route"


def no_static_headers() -> Mapping[str, str]:
    """Return no headers: the default of `AgentServer`'s `static_headers`."""
    return _NO_HEADERS


class AlreadySent(StreamResponse):
    """The response that a handler returns to aiohttp after writing the real one itself.

    It has no state, so two instances serve all requests.
    """

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self._keep = keep

    @property
    def keep_alive(self) -> bool:
        """True if the connection stays open."""
        return self._keep

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Write no head: it was written already."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Write nothing."""


SENT_KEEP = AlreadySent(keep=True)
SENT_CLOSE = AlreadySent(keep=False)


class ResponseBuilder:
    """Builder of whole responses.

    `static_headers()` must return the same mapping object until its content changes: the headers are cached by
    identity.
    """

    def __init__(self, static_headers: StaticHeaders = no_static_headers) -> None:
        self.static_headers = static_headers
        self._seen: Mapping[str, str] = _NO_HEADERS
        self._heads: dict[tuple[int, bool], str] = {}
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def new_request_id(self) -> str:
        """Return the request id of a request that has none."""
        return f"{self._prefix}-{next(self._numbers):x}"

    def response(
        self, reply: Reply, body: bytes | None, request_id: str | None, more: str, *, head_only: bool = False
    ) -> bytes:
        """Return a whole response; `body` is the encoded body of the reply.

        `request_id` is the client's, or None for a new one. `more` contains further header lines, each with its CRLF.
        """
        status = reply.status
        if reply.retry_after_s is not None:
            more += f"Retry-After: {reply.retry_after_s}\r\n"
        if request_id is None:
            request_id = self.new_request_id()
        static = self.static_headers()
        if static is not self._seen:
            self._seen = static
            self._heads.clear()
        head = self._heads.get((status, body is None))
        if head is None:
            head = self._heads[status, body is None] = self._head(status, body is None)
        length = "" if body is None else f"{len(body)}\r\n"
        text = f"{head}{length}Date: {rfc822_formatted_time()}\r\nX-Request-Id: {request_id}\r\n{more}\r\n"
        return text.encode("ascii") if body is None or head_only else text.encode("ascii") + body

    def error(self, status: int, text: str, *, more: str = "") -> bytes:
        """Return the response to a request that is rejected before it becomes a call and closes the connection."""
        body = encode_body({"success": False, "error": text})
        return self.response(Reply(status), body, None, f"Connection: close\r\n{more}")

    def _head(self, status: int, empty: bool) -> str:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += (f"{_UNFIT.sub('', name)}: {_UNFIT.sub('', value)}" for name, value in self._seen.items())
        if empty:
            # RFC 9110 section 8.6 forbids a Content-Length in a 204.
            return "\r\n".join([*lines, ""] if status == 204 else [*lines, "Content-Length: 0", ""])
        return "\r\n".join([*lines, "Content-Type: application/json", "Content-Length: "])


def well_formed_id(given: str | None) -> str | None:
    """Return the request id of a client, or None unless it is well-formed."""
    return given if given is not None and _SANE_ID.fullmatch(given) else None


class RefusedCalls:
    """Recorder of the calls that the server answers with 4xx or 5xx.

    The status shows every kind of refusal; the log shows each at most once a minute.
    """

    def __init__(self, recent: RecentCalls) -> None:
        self._recent = recent

    def note(self, now: float, status: int, route: str, body: Any = None) -> None:
        """Record one refused call; `body` is the reply's body with the reason under `error`."""
        reason = body.get("error") if isinstance(body, dict) else body
        kind = self._recent.note(now, status, route, reason if isinstance(reason, str) else "")
        about = f"{kind.status} {kind.route} {kind.reason}"
        log.warning("call_refused", dedupe_key=about, status=status, route=kind.route, reason=kind.reason)


def route_of(method: str, target: str, match: Match | None) -> str:
    """Return the route of a request for display: its pattern, or its path without the query if no route matched."""
    if match is not None:
        return f"{match.route.method} {match.route.pattern}"
    path = target.partition("?")[0].partition("#")[0]
    return f"{method} {path}"
