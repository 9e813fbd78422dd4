"""Delays every packet of a netfilter queue: `python nfq_delay.py QUEUE DELAY_MS`, until killed. Needs CAP_NET_ADMIN.

`tc netem` is not in every kernel; NFQUEUE is, and speaks netlink: the kernel hands over packet numbers, and holds each
packet until its verdict comes.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator

_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER_BYTES = 8 << 20
_QUEUE_PACKETS = 20_000
_NFQNL = 3 << 8  # the subsystem of nfnetlink; the low byte is the message's kind
_PACKET, _VERDICT, _CONFIG = 0, 1, 2
_REQUEST, _ACK = 1, 4
_NLMSG_ERROR = 2
_NF_ACCEPT = 1


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + b"\0" * (-length % 4)


class Queue:
    """One netfilter queue."""

    def __init__(self, number: int) -> None:
        """Bind to it. Raises `OSError`."""
        self._number = number
        self._serial = 0
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        bind, meta_only = struct.pack(">BBH", 1, 0, 0), struct.pack(">IB", 0, 1)
        for kind, data in ((1, bind), (2, meta_only), (3, struct.pack(">I", _QUEUE_PACKETS))):
            self._configure(_attribute(kind, data))

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._serial += 1
        payload = struct.pack(">BBH", 0, 0, self._number) + body
        self.socket.send(struct.pack("=IHHII", 16 + len(payload), _NFQNL | kind, flags, self._serial, 0) + payload)

    def _configure(self, body: bytes) -> None:
        self._send(_CONFIG, body, _REQUEST | _ACK)
        answer = self.socket.recv(65_536)
        (kind,), (code,) = struct.unpack_from("=H", answer, 4), struct.unpack_from("=i", answer, 16)
        if kind != _NLMSG_ERROR or code:
            raise OSError(-code, "the queue cannot be used")

    def accept(self, packet: int) -> None:
        """Let a packet go on."""
        self._send(_VERDICT, _attribute(2, struct.pack(">II", _NF_ACCEPT, packet)), _REQUEST)

    def packets(self) -> Iterator[int]:
        """The numbers of the packets that have come; waits for the first."""
        try:
            data = self.socket.recv(1 << 20)
        except OSError as error:
            if error.errno == errno.ENOBUFS:  # more came than the kernel would keep: those are lost
                return
            raise
        offset = 0
        while offset + 16 <= len(data):
            length, kind = struct.unpack_from("=IH", data, offset)
            if kind == _NFQNL | _PACKET:
                yield from self._number_of(data, offset + 20, offset + length)
            offset += (length + 3) & ~3

    @staticmethod
    def _number_of(data: bytes, offset: int, end: int) -> Iterator[int]:
        while offset + 4 <= end:
            length, kind = struct.unpack_from("=HH", data, offset)
            if kind & 0x7FFF == 1:
                yield struct.unpack_from(">I", data, offset + 4)[0]
                return
            offset += (length + 3) & ~3


def main(number: int, delay_s: float) -> None:
    queue = Queue(number)
    print("ready", flush=True)
    waiting: deque[tuple[float, int]] = deque()
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            queue.accept(waiting.popleft()[1])
        timeout_s = max(0.0, waiting[0][0] - now) if waiting else None
        if select.select([queue.socket], [], [], timeout_s)[0]:
            due = time.monotonic() + delay_s
            waiting.extend((due, packet) for packet in queue.packets())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]) / 1000)
