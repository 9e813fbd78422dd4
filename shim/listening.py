"""Listening: ports are bound before anything else is started, and connections are accepted a few at a time."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Protocol, cast

from shim.errors import StartError

ANY_IPV6 = "::"
BACKLOG = 1024
ACCEPTED_PER_TURN = 32
ACCEPT_AGAIN_S = 1.0

logger = logging.getLogger(__name__)


async def bind(section: str, hosts: Iterable[str], port: int) -> list[socket.socket]:
    """Return one bound socket for each address of the hosts; none of them listens yet.

    `section` is `listen` or `admin`. With port 0 all addresses get the same free port. `::` stands for all addresses of
    both families. Raises `StartError`, whose text names key, value and remedy.
    """
    sockets: list[socket.socket] = []
    try:
        for host in hosts:
            for family, address in await _addresses(section, host, port):
                at = port or (sockets[0].getsockname()[1] if sockets else 0)
                try:
                    sockets.append(_bound(family, address, at))
                except OSError as error:
                    raise StartError(_explain(section, host, at, error)) from None
    except BaseException:
        for made in sockets:
            made.close()
        raise
    return sockets


async def _addresses(section: str, host: str, port: int) -> list[tuple[int, str]]:
    # Not `socket.getaddrinfo`: a process could not be stopped while the name server does not answer.
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise StartError(f"{section}.host {host} has no address: set {section}.host to one of this machine") from None
    return list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in found))


def _bound(family: int, address: str, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != ANY_IPV6))
        made.bind((address, port))
    except BaseException:
        made.close()
        raise
    return made


def _explain(section: str, host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{section}.port {port} on {section}.host {host} is taken by another process: "
            f"stop it (ss -ltnp 'sport = :{port}' shows it) or change {section}.port"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{section}.port {port} needs a privilege that this user has not: set {section}.port to 1024 or more"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{section}.host {host} is not an address of this machine: change {section}.host"
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return f"{section}.host {host} with {section}.port {port} cannot be listened on: {reason}"


class CountedConnection(Protocol):
    """A connection's protocol that is counted when it is accepted, before its TLS handshake."""

    @property
    def transport(self) -> asyncio.Transport | None:
        """The transport, `None` before the handshake has ended."""

    def enter(self) -> bool:
        """Count the connection; return False if there are too many."""

    def leave(self) -> None:
        """End the count of the connection. Idempotent."""


class Listener:
    """A listener that accepts a few connections in one turn of the event loop, and bounds the time of TLS handshakes.

    asyncio and uvloop accept all connections that wait, which may be a thousand: the agents that are connected would
    wait for a tenth of a second meanwhile. With TLS they also report a connection only after its handshake, so that
    peers that never begin one would not be counted.
    """

    def __init__(
        self, make: Callable[[], CountedConnection], tls: ssl.SSLContext | None, handshake_timeout_s: float
    ) -> None:
        self._make = make
        self._tls = tls
        self._handshake_timeout_s = None if tls is None else handshake_timeout_s
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, sockets: Iterable[socket.socket]) -> None:
        """Listen on bound sockets."""
        for listening in sockets:
            listening.listen(BACKLOG)
            self._spawn(self._accept(listening))

    def stop(self) -> None:
        """Stop accepting and cancel the handshakes in progress."""
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:  # no file descriptors left: connections wait in the kernel's backlog
                logger.warning("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            try:
                self._open(accepted)
            except Exception:  # a defect with one connection must not end the listener for all
                logger.exception("a connection could not be opened")
                accepted.close()
            number += 1
            if number % ACCEPTED_PER_TURN == 0:
                await asyncio.sleep(0)  # `sock_accept` returns at once while connections wait

    def _open(self, accepted: socket.socket) -> None:
        connection = self._make()
        if self._tls is None or connection.enter():
            opening = self._spawn(
                asyncio.get_running_loop().connect_accepted_socket(
                    partial(cast, "asyncio.Protocol", connection),
                    accepted,
                    ssl=self._tls,
                    ssl_handshake_timeout=self._handshake_timeout_s,
                )
            )
            opening.add_done_callback(partial(self._opened, accepted, connection))
        else:
            connection.leave()
            accepted.close()

    def _opened(self, accepted: socket.socket, connection: CountedConnection, task: asyncio.Task[Any]) -> None:
        """Close a socket that did not become a connection, whatever the reason, and end its count."""
        if not task.cancelled():  # otherwise the server stops
            error = task.exception()
            if error is None:
                return
            # `OSError` includes ssl.SSLError and TimeoutError: they are the peer's fault.
            level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
            logger.log(level, "a connection could not be opened: %s", type(error).__name__)
        if connection.transport is None:
            connection.leave()
            accepted.close()
