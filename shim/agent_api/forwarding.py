"""Conversion of requests and replies for the vendor's HTTP API and for other replicas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage

from shim.agent_api.connection import RequestContext
from shim.agent_api.request_body import check_announcement
from shim.core.agent_calls import AgentCall
from shim.ports import Caller, Forwarder, ProxyRequest, ProxyResponse
from shim.protocol.dialects import Match
from shim.protocol.http import header_bytes, header_text

_ORIGIN = re.compile(r"\A[A-Za-z][A-Za-z0-9+.\-]*://[^/?#]*", re.ASCII)
_BODILESS = frozenset({204, 304})


def is_large(request: RequestContext, limit_bytes: int) -> bool:
    """Return True if a body is passed on in pieces: it exceeds `limit_bytes` or its size is not announced."""
    length = request.headers.get(hdrs.CONTENT_LENGTH)
    return int(length) > limit_bytes if length is not None else not request.payload.is_eof()


def forwarded(request: RequestContext, base_path: str, caller: Caller, call: AgentCall | None) -> ProxyRequest:
    """Return the request for `ports.Fallback`; a body that was not read is streamed."""
    message, data = request.message, request.data
    pairs = headers_of(message)
    # aiohttp's client sets the Content-Length of a whole body itself.
    headers = tuple((name, value) for name, value in pairs if data is None or name.lower() != "content-length")
    body = request.payload.iter_any() if data is None else data
    target = target_of(message.path, base_path)
    return ProxyRequest(message.method, target, headers, body, caller, call, request.arrived_s)


def forward_at_once(
    request: RequestContext, match: Match, caller: Caller, forwarder: Forwarder | None, limit_bytes: int
) -> bool:
    """Forward the unchanged bytes of a heartbeat to the replica that owns the agent's shard.

    Returns False if that is not possible without waiting.
    """
    connection = request.connection
    suitable = request.immediate and match.route.operation == "heartbeat" and not request.message.chunked
    if forwarder is None or not connection.raw_request or not suitable:
        return False
    if hdrs.CONTENT_ENCODING in request.headers:
        return False
    check_announcement(request, limit_bytes)
    return forwarder.forward_now(caller.token, connection.raw_request, connection.answer_late)


def headers_of(message: RawRequestMessage) -> tuple[tuple[str, str], ...]:
    """Return all headers of a request as received."""
    return tuple((header_text(name), header_text(value)) for name, value in message.raw_headers)


def target_of(raw_target: str, base_path: str) -> str:
    """Return the path and query of a request target without the configured base path, with one leading slash."""
    target = "/" + _ORIGIN.sub("", raw_target).lstrip("/")
    base = base_path.strip("/")
    if base and (target == f"/{base}" or target.startswith((f"/{base}/", f"/{base}?"))):
        target = "/" + target[len(base) + 1 :].lstrip("/")
    return target


def head(
    proxied: ProxyResponse, more: Mapping[str, str], *, keep: bool, http11: bool, head_only: bool = False
) -> tuple[bytes, bool]:
    """Return the head of a reply, and True if the body must be sent in chunks.

    `head_only` is set for HEAD requests, whose replies have no body.
    """
    whole = isinstance(proxied.body, bytes)
    # RFC 9112 section 6: a 204 or 304 has no body. A client would take chunks behind it for the next reply.
    bodiless = proxied.status in _BODILESS
    framed = whole or bodiless or head_only or any(name.lower() == "content-length" for name, _ in proxied.headers)
    own = {name.lower() for name in more}
    if bodiless or (whole and not head_only):
        own.add("content-length")
    lines = [f"HTTP/1.1 {proxied.status} {_phrase(proxied.status)}"]
    lines += [f"{name}: {value}" for name, value in proxied.headers if name.lower() not in own]
    lines += [f"{name}: {value}" for name, value in more.items()]
    if isinstance(proxied.body, bytes) and not bodiless and not head_only:
        lines.append(f"Content-Length: {len(proxied.body)}")
    chunked = not framed and http11
    if chunked:
        lines.append(f"{hdrs.TRANSFER_ENCODING}: chunked")
    if not keep or not (framed or http11):
        lines.append(f"{hdrs.CONNECTION}: close")
    elif not http11:
        lines.append(f"{hdrs.CONNECTION}: keep-alive")
    return header_bytes("\r\n".join([*lines, "", ""])), chunked


def chunk(piece: bytes) -> bytes:
    """Return one chunk of a chunked body; an empty piece ends the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
