"""Queries of the kernel's state of a TCP connection, which asyncio does not expose.

They show if the peer can have received a reply, see docs/reference/protocol.md#3-commands.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import socket
import struct
import sys
import termios
from contextlib import suppress

from shim.ports import DeliveryEvidence

_LINUX = sys.platform.startswith("linux")
_SIOCINQ = termios.FIONREAD
_SIOCOUTQ = termios.TIOCOUTQ  # the same number on Linux
_ESTABLISHED = 1
_FIN_WAIT_1 = 4  # our FIN is not acknowledged yet
_FIN_WAIT_2 = 5  # our FIN is acknowledged, and the peer's has not arrived
_LAST_ACK_RECEIVED = struct.Struct("=56xI")  # of struct tcp_info: milliseconds since the peer acknowledged anything
_GRAIN_S = 0.02
_MOST_PROBES = 127  # the highest number that the kernel accepts
REPORT_EVERY_S = 0.25
_PRESENT_S = 1.5  # longer than between two probes, shorter than `connection.FAREWELL_S` after a last reply


def acknowledged(sock: socket.socket) -> bool:
    """Return True if the peer's kernel has acknowledged everything written to an open socket and sent no reset.

    A peer that closed its socket before our bytes arrived answers them with a reset. If its FIN was queued before,
    reading still yields an orderly end. The unacknowledged bytes and the socket's pending error reveal the reset. On
    systems other than Linux neither can be queried, and an orderly end counts as an acknowledgement.
    """
    if not _LINUX:
        return True
    try:
        unacknowledged = fcntl.ioctl(sock.fileno(), _SIOCOUTQ, b"\0\0\0\0")
        return unacknowledged == b"\0\0\0\0" and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    except (OSError, ValueError):  # ValueError: the socket is closed
        return False


def hung_up(sock: socket.socket) -> bool:
    """Return True if the peer's FIN or RST has arrived, even if the event loop has not seen it yet."""
    if not _LINUX:
        return False
    try:
        # The first byte of struct tcp_info is tcpi_state.
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
    except OSError:
        return True


def unread(sock: socket.socket) -> bool:
    """Return True if bytes of the peer have arrived that the process has not read yet."""
    if not _LINUX:
        return False
    try:
        return fcntl.ioctl(sock.fileno(), _SIOCINQ, b"\0\0\0\0") != b"\0\0\0\0"
    except (OSError, ValueError):  # ValueError: the socket is closed
        return False


def is_near(sock: socket.socket) -> bool:
    """Return True if the peer is on this machine, whose kernel knows the state of both sides."""
    try:
        here, there = str(sock.getsockname()[0]), str(sock.getpeername()[0])
    except (OSError, IndexError):
        return False
    return here == there or there.startswith("127.")


def open_until(sock: socket.socket, now_s: float) -> float:
    """Return the time up to which the peer certainly had its side of the connection open, -inf if it is unknown.

    It is unknown unless the peer's kernel has acknowledged everything. A peer on this machine has it open at `now_s`,
    or not at all. Another machine had it open when it last acknowledged anything: since then it, or the network
    between, may have gone, and a reset is sent only once.
    """
    if not _LINUX:
        return now_s
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK_RECEIVED.size)
        unacknowledged = fcntl.ioctl(sock.fileno(), _SIOCOUTQ, b"\0\0\0\0")
    except (OSError, ValueError):  # ValueError: the socket is closed
        return -math.inf
    if state[0] not in (_ESTABLISHED, _FIN_WAIT_2) or unacknowledged != b"\0\0\0\0":
        return -math.inf
    (silent_ms,) = _LAST_ACK_RECEIVED.unpack(state)
    return now_s if is_near(sock) else now_s - silent_ms / 1000 - _GRAIN_S


def closed_or_present(sock: socket.socket, now_s: float) -> bool:
    """Return True if the peer's FIN or RST has arrived, or if its kernel has confirmed the connection lately.

    If neither is so when we close a connection, the peer may be gone without having read what its kernel acknowledged.
    """
    if not _LINUX:
        return True
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return False
    peer_closed = state not in (_ESTABLISHED, _FIN_WAIT_1, _FIN_WAIT_2)
    return peer_closed or open_until(sock, now_s) >= now_s - _PRESENT_S


def probe(sock: socket.socket, *, after_s: int, every_s: int) -> None:
    """Let the kernel ask a silent peer on another machine if it has the connection: it acknowledges or resets.

    An agent that cannot be reached for a while has often read the reply: its next request on the connection shows that.
    So the kernel asks as often as it can before it gives the connection up. By default ten seconds would be enough.
    """
    if not _LINUX or is_near(sock):
        return
    with suppress(OSError):  # the connection has ended
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _MOST_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, after_s)


class PeerWatch:
    """Reporter of the time up to which the agent's side of a connection was open, while evidence is awaited on it."""

    def __init__(self, evidence: DeliveryEvidence, number: int) -> None:
        self._evidence = evidence
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, sock: socket.socket | None) -> None:
        """Begin to watch the peer of a socket, or go on."""
        if sock is not None and self._sock is None:
            self._sock = sock
            probe(sock, after_s=1, every_s=1)
            self._timer = self._loop.call_later(REPORT_EVERY_S, self._report_open)

    def end(self) -> None:
        """Stop watching. Idempotent; called before the connection ends, because its descriptor may be used again."""
        sock, self._sock = self._sock, None
        if sock is not None:
            probe(sock, after_s=60, every_s=15)
        if self._timer is not None:
            self._timer.cancel()

    def open_until(self) -> float:
        """Return the loop time up to which the peer had the connection open, -inf if it is unknown (`OpenUntil`)."""
        return -math.inf if self._sock is None else open_until(self._sock, self._loop.time())

    def _report_open(self) -> None:
        awaited = False
        try:
            awaited = self._evidence.connection_open(self._number, self.open_until())
        finally:
            if awaited:
                self._timer = self._loop.call_later(REPORT_EVERY_S, self._report_open)
            else:
                self.end()  # also after an exception: otherwise the next reply could not begin the watch again
