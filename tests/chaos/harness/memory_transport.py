"""A connection in memory, on which bytes arrive in pieces that the test chooses, in virtual time.

A kernel joins and cuts what is sent to it as it likes. Here a piece is what one read of the event loop returns.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

Cut = Callable[[bytes], list[bytes]]


@cache
def _idle_socket() -> tuple[socket.socket, socket.socket]:
    """Return a TCP connection on which nothing happens: the kernel's answers to questions about a healthy one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname()[:2])
        other, _ = listener.accept()
        return one, other


class MemoryTransport(asyncio.Transport):
    """The server's end of a connection whose peer is the test.

    `written` has everything that the server wrote. Pieces wait while the server has paused reading, as they would in
    the kernel.
    """

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__({"socket": _idle_socket()[0], "peername": ("127.0.0.1", 1)})
        self.written = bytearray()
        self.wrote_eof = False
        self._loop = asyncio.get_running_loop()
        self._protocol: Any = protocol
        self._pieces: deque[bytes] = deque()
        self._reading = True
        self._closing = False
        protocol.connection_made(self)

    # --- the peer ---

    def send(self, pieces: Iterable[bytes]) -> None:
        """Send pieces, each of which arrives in a read of its own, all in the same turn of the event loop."""
        self._pieces.extend(pieces)
        self._deliver()

    def hang_up(self) -> None:
        """Close the connection in an orderly way."""
        if not self._closing and not self._protocol.eof_received():
            self.close()

    @property
    def unread(self) -> int:
        """Number of bytes that the server has not read, because it paused reading."""
        return sum(map(len, self._pieces))

    def _deliver(self) -> None:
        while self._pieces and self._reading and not self._closing:
            piece = self._pieces.popleft()
            if isinstance(self._protocol, asyncio.BufferedProtocol):  # asyncio's TLS
                room = self._protocol.get_buffer(len(piece))
                room[: len(piece)] = piece
                self._protocol.buffer_updated(len(piece))
            else:
                self._protocol.data_received(piece)

    # --- asyncio.Transport ---

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._deliver)

    def write(self, data: Any) -> None:
        if not self._closing:
            self.written += data

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.wrote_eof = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Ignore the limits: this peer takes everything at once."""

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def _force_close(self, _exc: BaseException | None) -> None:
        """Drop the connection; asyncio's TLS calls this method of its transport."""
        self.close()


class _Pipe(MemoryTransport):
    """One end of a connection in memory between two protocols of this process."""

    def __init__(self, protocol: Any, cut: Cut, other: _Pipe | None = None) -> None:
        self.other = other
        self._cut = cut
        super().__init__(protocol)

    def write(self, data: Any) -> None:
        super().write(data)
        if self.other is not None and not self._closing:
            self._loop.call_soon(self.other.send, self._cut(bytes(data)))

    def close(self) -> None:
        super().close()
        if self.other is not None:
            self._loop.call_soon(self.other.hang_up)


def connect(client: Any, server: Any, cut: Cut = lambda data: [data]) -> MemoryTransport:
    """Connect two protocols; return the client's transport. `cut` returns the pieces in which a write arrives."""
    accepted = _Pipe(server, cut)
    accepted.other = opened = _Pipe(client, cut, accepted)
    return opened
