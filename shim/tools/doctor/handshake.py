"""The WebSocket handshake: does the way pass it on, is the token accepted, do frames come back, do the clocks agree?

Nothing is registered: the connection is closed after one ping.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import struct
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from shim import __version__
from shim.clock import Clock
from shim.core.urls import with_query
from shim.settings import Upstream
from shim.tools.doctor.findings import Finding, failed, passed, warned
from shim.tools.doctor.network import Line, Target

SKEW_WARN_S = 30.0
SKEW_FAIL_S = 300.0
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PING, _PONG, _CLOSE = 0x9, 0xA, 0x8
_MAX_FRAMES = 100
_UPGRADED = 101


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of a response."""

    status: int
    headers: dict[str, str]

    @property
    def passed_by(self) -> str:
        """What names itself as standing on the way, `""` if nothing does."""
        named = [f"{self.headers[name][:60]} ({name})" for name in ("via", "server") if self.headers.get(name)]
        return " and ".join(named)


async def ask(line: Line, target: Target, upstream: Upstream, token: str, *, query: bool) -> Answer | None:
    """Send a WebSocket handshake with the token in the header or, with `query`, in the query (none if it is empty).

    `None`: the connection ended, or nothing came within `upstream.connect_timeout_s`.
    """
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    path = with_query(target.path, (("token", token),)) if query and token else target.path
    headers = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
    ]
    if token and not query:
        headers.append(f"Authorization: Bearer {token}")
    answer = await _exchange(line, target, upstream.connect_timeout_s, "GET", path, headers)
    if answer is not None and answer.status == _UPGRADED:
        digest = hashlib.sha1((key + _GUID).encode(), usedforsecurity=False).digest()
        if answer.headers.get("sec-websocket-accept") != base64.b64encode(digest).decode():
            return Answer(0, answer.headers)
    return answer


async def ask_time(line: Line, target: Target, upstream: Upstream) -> Answer | None:
    """A request that only the head of its answer is wanted of; nobody is named in it."""
    path = urlsplit(target.path).path
    return await _exchange(line, target, upstream.connect_timeout_s, "HEAD", path, ["Connection: close"])


async def _exchange(
    line: Line, target: Target, timeout_s: float, method: str, path: str, headers: list[str]
) -> Answer | None:
    proxy = target.proxy if not target.secure else None
    if proxy is not None:
        path = f"http://{target.authority}{path}"
        if proxy.authorization:
            headers = [*headers, f"Proxy-Authorization: {proxy.authorization}"]
    start = [f"{method} {path} HTTP/1.1", f"Host: {target.authority}", f"User-Agent: agent-shim-doctor/{__version__}"]
    try:
        async with asyncio.timeout(timeout_s):
            line.writer.write("\r\n".join([*start, *headers, "", ""]).encode())
            head = (await line.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return None
    first, *rest = head.split("\r\n")
    words = first.split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    pairs = (each.partition(":") for each in rest if ":" in each)
    return Answer(status, {name.strip().lower(): value.strip() for name, _, value in pairs})


# --- judging ----------------------------------------------------------------------------------------------------------


def judge_upgrade(answer: Answer | None) -> Finding:
    """Whether WebSockets are passed on, and who stands in the way."""
    if answer is None:
        todo = "something on the way, or the server, drops WebSocket handshakes: look at proxies and load balancers"
        return failed("upgrade", "the connection ended without an answer to the handshake", todo)
    status, by = answer.status, answer.passed_by
    behind = f"; the answer comes from {by}" if by else ""
    if status == _UPGRADED:
        return passed("upgrade", f"the WebSocket handshake is passed on{behind}")
    if status in (401, 403):
        return passed("upgrade", f"the endpoint answers {status}: it asks for a token first{behind}")
    if status == 0:
        return failed("upgrade", f"the answer to the handshake is not a WebSocket's{behind}", _MEND_WAY)
    if 300 <= status < 400:
        todo = "upstream.url must be the address itself: redirects are never followed with a token"
        return failed("upgrade", f"the handshake is redirected (HTTP {status}){behind}", todo)
    if status == 404:
        return failed("upgrade", f"no such path (HTTP 404){behind}", "look at upstream.url and upstream.path")
    if status == 407:
        todo = "credentials of the proxy: upstream.proxy: http://user:password@host:port"
        return failed("upgrade", f"the proxy wants credentials (HTTP 407){behind}", todo)
    if status == 429 or status >= 500:
        todo = "the controller, or what stands before it, is not well or asks to wait; the shim goes on trying"
        return failed("upgrade", f"HTTP {status}{behind}", todo)
    return failed("upgrade", f"HTTP {status} instead of 101: the upgrade is stripped on the way{behind}", _MEND_WAY)


_MEND_WAY = "let the proxy or load balancer pass the headers Upgrade and Connection on to the controller"


def judge_token(answers: list[tuple[str, Answer | None]], *, given: bool) -> Finding:
    """What the endpoint thinks of the token; `answers` are (way, answer) in the order of trying."""
    way, last = answers[-1]
    if last is None or last.status not in (_UPGRADED, 401, 403):
        return warned("token", "not examined: the handshake does not get that far", "mend the line upgrade first")
    if not given:
        if last.status == _UPGRADED:
            return warned("token", "the endpoint asks for none", "is upstream.url the vendor's controller?")
        return passed("token", "each agent brings its own; give one with --token-file to have it examined")
    if last.status == _UPGRADED:
        return passed("token", f"accepted (sent in the {way})")
    tried = " and ".join(f"{way} ({answer.status})" for way, answer in answers if answer is not None)
    todo = "put a valid token into upstream.token_file, with the permission to connect agents"
    return failed("token", f"refused: {tried}", todo)


def judge_clock(answer: Answer | None) -> Finding:
    """The difference between this clock and the `Date` of an answer."""
    try:
        theirs = parsedate_to_datetime((answer.headers if answer is not None else {}).get("date", "")).timestamp()
    except (ValueError, TypeError):
        return warned("clock", "unknown: no answer told the time", "compare this machine's clock by hand")
    skew_s = Clock().wall_s() - theirs
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the controller"
    if abs(skew_s) < SKEW_WARN_S:
        return passed("clock", "agrees with the controller's" if abs(skew_s) < 2 else text)
    todo = "let this machine synchronise its clock (NTP); certificates and expiries depend on it"
    return failed("clock", text, todo) if abs(skew_s) >= SKEW_FAIL_S else warned("clock", text, todo)


# --- frames -----------------------------------------------------------------------------------------------------------


async def ping(line: Line, timeout_s: float) -> Finding:
    """Send a ping, wait for its pong, close."""
    payload = secrets.token_bytes(8)
    clock = Clock()
    before = clock.monotonic_s()
    try:
        async with asyncio.timeout(timeout_s):
            line.writer.write(_frame(_PING, payload))
            if not await _pong(line, payload):
                todo = "the server closes connections at once: its log says why"
                return failed("frames", "the connection was closed before a ping came back", todo)
    except (TimeoutError, OSError, asyncio.IncompleteReadError):
        todo = "something on the way passes the handshake and not the frames behind it: look at proxies"
        return failed("frames", f"a ping did not come back within {timeout_s:g} s", todo)
    took_ms = (clock.monotonic_s() - before) * 1000
    line.writer.write(_frame(_CLOSE, struct.pack(">H", 1000)))
    return passed("frames", f"a ping came back in {took_ms:.0f} ms")


async def _pong(line: Line, payload: bytes) -> bool:
    for _ in range(_MAX_FRAMES):
        opcode, data = await _read_frame(line.reader)
        if opcode == _CLOSE:
            return False
        if opcode == _PONG and data == payload:
            return True
    return False


def _frame(opcode: int, payload: bytes) -> bytes:
    """A short masked frame, as a client sends it (RFC 6455 §5.2)."""
    mask = secrets.token_bytes(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes((0x80 | opcode, 0x80 | len(payload))) + mask + masked


async def _read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack(">H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack(">Q", await reader.readexactly(8))
    return first & 0x0F, await reader.readexactly(min(size, 1 << 24))
