"""Listeners take one address or several; `::` is every address of both families."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from shim.errors import StartError
from shim.listening import ACCEPTED_PER_TURN, BACKLOG, Listener, bind
from tests.security.raw_client import ask, request
from tests.support.processes import free_port, world


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    "host, reached",
    [
        pytest.param("::", ["127.0.0.1", "::1"], marks=needs_ipv6),
        pytest.param(["127.0.0.1", "::1"], ["127.0.0.1", "::1"], marks=needs_ipv6),
        (["127.0.0.1", "127.0.0.2"], ["127.0.0.1", "127.0.0.2"]),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
async def test_both_ports_answer_on_all_their_addresses(tmp_path: Path, host: Any, reached: list[str]) -> None:
    ports = {"listen": free_port(), "admin": free_port()}
    config = {section: {"host": host, "port": port} for section, port in ports.items()}
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        for address in reached:
            headers = ("Authorization: Bearer tok-of-the-cluster",)
            health = await ask(f"{address}:{ports['listen']}", request("GET", "/api/v1/health", *headers))
            healthz = await ask(f"{address}:{ports['admin']}", request("GET", "/healthz"))
            assert (health.status, healthz.status) == (200, 200), address


class Arrival(asyncio.Protocol):
    """A `CountedConnection` that ends at once."""

    transport: asyncio.Transport | None = None

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()

    def enter(self) -> bool:
        return True

    def leave(self) -> None:
        pass


async def test_of_many_connections_that_wait_a_few_are_accepted_in_a_turn_of_the_loop() -> None:
    loop, all_lost, left = asyncio.get_running_loop(), asyncio.Event(), 5 * ACCEPTED_PER_TURN
    by_turn = [0]

    def turn() -> None:
        by_turn.append(0)
        if not all_lost.is_set():
            loop.call_soon(turn)

    def lost() -> None:
        nonlocal left
        left -= 1
        if not left:
            all_lost.set()

    def accept() -> Arrival:
        by_turn[-1] += 1
        return Arrival(lost)

    [bound] = await bind("listen", ("127.0.0.1",), 0)
    bound.listen(BACKLOG)
    crowd = [socket.create_connection(bound.getsockname()) for _ in range(left)]
    listener = Listener(accept, None, 10)
    turn()
    listener.start([bound])
    async with asyncio.timeout(30):
        await all_lost.wait()
    assert (sum(by_turn), max(by_turn)) == (len(crowd), ACCEPTED_PER_TURN)
    listener.stop()
    for each in (*crowd, bound):
        each.close()


async def test_the_environment_gives_several_as_json(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        shim.environment["SHIM_ADMIN__HOST"] = '["127.0.0.1", "127.0.0.2"]'
        await shim.start()
        port = shim.admin.rpartition(":")[2]
        assert (await ask(f"127.0.0.2:{port}", request("GET", "/healthz"))).status == 200


async def test_a_fault_names_the_address_among_several_and_leaves_none_taken() -> None:
    with pytest.raises(StartError, match=r"admin.host 192\.0\.2\.1 is not an address of this machine"):
        await bind("admin", ("127.0.0.1", "192.0.2.1"), 0)


class Departure(Arrival):
    """A `CountedConnection` whose count ends."""

    def leave(self) -> None:
        self._lost()


async def test_a_connection_that_cannot_be_opened_is_closed_and_no_longer_counted() -> None:
    """Only errors of the network were expected: after any other the connection was counted for ever."""
    left = asyncio.Event()
    [listening] = await bind("listen", ("127.0.0.1",), 0)
    listener = Listener(lambda: Departure(left.set), cast("ssl.SSLContext", "no context"), 30)
    listener.start([listening])
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    try:
        async with asyncio.timeout(60):
            await left.wait()
            assert await reader.read() == b""
    finally:
        writer.close()
        listener.stop()
        listening.close()


async def test_a_defect_with_one_connection_does_not_end_the_listener() -> None:
    """The listener's task ended with it, and nobody was served any more, although the process went on."""
    served = asyncio.Event()
    made = iter([None, Arrival(served.set)])

    def make() -> Arrival:
        arrival = next(made)
        if arrival is None:
            raise RuntimeError("a defect")
        return arrival

    [listening] = await bind("listen", ("127.0.0.1",), 0)
    listener = Listener(make, None, 30)
    listener.start([listening])
    async with asyncio.timeout(60):
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            assert await reader.read() == b""
            writer.close()
        await served.wait()
    listener.stop()
    listening.close()
