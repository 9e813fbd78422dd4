"""What the kernel knows of a TCP connection and asyncio does not tell: the grounds of "delivered" (protocol.md §3)."""

from __future__ import annotations

import fcntl
import socket
import sys
import termios

_LINUX = sys.platform.startswith("linux")
_SIOCINQ = termios.FIONREAD
_SIOCOUTQ = termios.TIOCOUTQ  # the same number on Linux
_ESTABLISHED = 1


def acknowledged(sock: socket.socket) -> bool:
    """True if the peer's kernel has acknowledged everything that was written to an open socket, and sent no reset.

    A peer that had closed before our bytes came answers them with a reset; but when its FIN was already queued, reading
    gives an orderly end all the same. The bytes then stay unacknowledged, and the reset is the socket's pending error.
    Outside Linux nothing is known and the orderly end is believed.
    """
    if not _LINUX:
        return True
    try:
        unacknowledged = fcntl.ioctl(sock.fileno(), _SIOCOUTQ, b"\0\0\0\0")
        return unacknowledged == b"\0\0\0\0" and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    except (OSError, ValueError):  # ValueError: the socket is closed
        return False


def hung_up(sock: socket.socket) -> bool:
    """True if the peer's FIN or RST is already here, even if the event loop has not seen it yet."""
    if not _LINUX:
        return False
    try:
        # The first byte of struct tcp_info is tcpi_state.
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
    except OSError:
        return True


def unread(sock: socket.socket) -> bool:
    """Return true if bytes of the peer have arrived that nobody has read yet."""
    if not _LINUX:
        return False
    try:
        return fcntl.ioctl(sock.fileno(), _SIOCINQ, b"\0\0\0\0") != b"\0\0\0\0"
    except (OSError, ValueError):  # ValueError: the socket is closed
        return False
