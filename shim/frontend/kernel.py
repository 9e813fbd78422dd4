"""What the kernel knows of a TCP connection and asyncio does not tell: the grounds of "delivered" (protocol.md §3)."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios

_LINUX = sys.platform.startswith("linux")
_SIOCOUTQ = termios.TIOCOUTQ  # the same number on Linux
_ESTABLISHED = 1
_CLOSED = 7


def acknowledged(transport: asyncio.Transport) -> bool:
    """True if the peer's kernel has acknowledged everything that was written to an open transport.

    A peer that had closed before our bytes came answers them with a reset; but when its FIN was already queued, asyncio
    reports an orderly end all the same. The bytes then stay unacknowledged, and the state is CLOSED instead of
    CLOSE_WAIT. Outside Linux only the transport's own buffer is known.
    """
    if transport.get_write_buffer_size():
        return False
    if not _LINUX:
        return True
    try:
        unacknowledged = fcntl.ioctl(_descriptor(transport), _SIOCOUTQ, b"\0\0\0\0")
        return unacknowledged == b"\0\0\0\0" and _state(transport) != _CLOSED
    except OSError:
        return False


def hung_up(transport: asyncio.Transport) -> bool:
    """True if the peer's FIN or RST is already here, even if the event loop has not seen it yet."""
    if not _LINUX:
        return False
    try:
        return _state(transport) != _ESTABLISHED
    except OSError:
        return True


def _descriptor(transport: asyncio.Transport) -> int:
    descriptor: int = transport.get_extra_info("socket").fileno()
    return descriptor


def _state(transport: asyncio.Transport) -> int:
    # The first byte of struct tcp_info is tcpi_state.
    info: bytes = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0]
