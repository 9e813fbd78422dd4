"""A name server that can be told to answer nothing, and a resolver configuration that asks it.

It needs a mount namespace of one's own and port 53 there: `network.reenter` gets both.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import subprocess
from pathlib import Path

from tests.support import network

ADDRESS = "127.0.0.53"
_A, _IN, _TTL_S = 1, 1, 1
_RESPONSE = 0x8180  # a response to a query for recursion, without an error


class NameServer(asyncio.DatagramProtocol):
    """Answers every question for an IPv4 address with the same one, and none while `hangs`."""

    def __init__(self, address: str) -> None:
        self._address = ipaddress.IPv4Address(address).packed
        self._transport: asyncio.DatagramTransport | None = None
        self.hangs = False
        self.unanswered = 0

    async def start(self, resolver: Path, timeout_s: int = 5) -> None:
        """Listen, and have every process of this mount namespace ask here. `resolver` is a file to write."""
        assert os.environ.get(network.INSIDE), "in somebody else's mount namespace"
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, (ADDRESS, 53))
        _ask_here(resolver, timeout_s)

    def close(self) -> None:
        """Stop listening, and give the namespace its resolver configuration back."""
        if self._transport is not None:
            self._transport.close()
            subprocess.run(["umount", "/etc/resolv.conf"], check=False)

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        if self.hangs or self._transport is None:
            self.unanswered += 1
            return
        self._transport.sendto(answer(data, self._address), peer)


def _ask_here(resolver: Path, timeout_s: int) -> None:
    resolver.write_text(f"nameserver {ADDRESS}\noptions timeout:{timeout_s} attempts:2\n")
    subprocess.run(["mount", "--bind", str(resolver), "/etc/resolv.conf"], check=True)


def answer(question: bytes, address: bytes) -> bytes:
    """Return the response to a query for one name: its address, or no records for a type other than A."""
    end = question.index(b"\0", 12) + 5  # the name, its type and its class
    wanted = int.from_bytes(question[end - 4 : end - 2], "big")
    records = [b"\xc0\x0c", *(number.to_bytes(2, "big") for number in (_A, _IN)), _TTL_S.to_bytes(4, "big")]
    records += [len(address).to_bytes(2, "big"), address]
    found = b"".join(records) if wanted == _A else b""
    counts = b"".join(number.to_bytes(2, "big") for number in (_RESPONSE, 1, 1 if found else 0, 0, 0))
    return question[:2] + counts + question[12:end] + found
