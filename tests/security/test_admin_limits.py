"""The admin listener is bounded: who reaches it must not use up the descriptors that agents need."""

from __future__ import annotations

import asyncio

from shim.admin.limits import FIRST_REQUEST_S, MAX_CONNECTIONS, Bounded
from tests.support.virtual import VirtualLoop


class Wire(asyncio.Transport):
    """A transport that notes whether it was aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Inner(asyncio.Protocol):
    """A protocol that notes what reaches it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.log.append("made")

    def data_received(self, data: bytes) -> None:
        self.log.append(data.decode())

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.append("lost")


class Door:
    """A bounded listener and those who knock."""

    def __init__(self) -> None:
        self.inner: list[Inner] = []
        self.bounded = Bounded(self._make)

    def _make(self) -> Inner:
        self.inner.append(Inner())
        return self.inner[-1]

    def knock(self) -> tuple[asyncio.Protocol, Wire]:
        protocol, wire = self.bounded(), Wire()
        protocol.connection_made(wire)
        return protocol, wire


async def test_so_many_connections_and_no_more() -> None:
    door = Door()
    crowd = [door.knock() for _ in range(MAX_CONNECTIONS)]
    assert not any(wire.aborted for _, wire in crowd)
    late, wire = door.knock()
    assert wire.aborted
    late.connection_lost(None)
    assert door.inner[-1].log == [], "aiohttp never hears of it"
    crowd[0][0].connection_lost(None)
    again, wire = door.knock()
    assert not wire.aborted
    for protocol, _ in [*crowd[1:], (again, wire)]:
        protocol.connection_lost(None)
    assert door.bounded.open_connections == 0


def test_a_slow_head_is_cut_off_and_a_whole_one_is_not_however_it_is_dripped() -> None:
    async def scene() -> None:
        door = Door()
        (slow, slow_wire), (dripped, dripped_wire), (_, silent_wire) = (door.knock() for _ in range(3))
        slow.data_received(b"GET / HTTP/1.1\r\nX: y\r\n")
        for number in b"GET / HTTP/1.1\r\n\r\n":
            dripped.data_received(bytes([number]))
        await asyncio.sleep(FIRST_REQUEST_S - 1)
        slow.data_received(b"Z: y\r\n")
        assert not slow_wire.aborted
        await asyncio.sleep(2)
        assert [slow_wire.aborted, dripped_wire.aborted, silent_wire.aborted] == [True, False, True]
        assert "".join(door.inner[1].log) == "madeGET / HTTP/1.1\r\n\r\n"

    loop = VirtualLoop()
    loop.run_until_complete(scene())
    loop.close()
