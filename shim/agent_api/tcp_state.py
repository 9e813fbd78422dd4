"""Queries of the kernel's state of a TCP connection, which asyncio does not expose.

They show if the peer can have received a reply, see docs/reference/protocol.md#3-commands.
"""

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
