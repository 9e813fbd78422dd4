"""Binding of listeners before anything else is started, with errors that name the key and the remedy."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

from shim.errors import StartError

ANY_IPV6 = "::"


def bind(section: str, hosts: Iterable[str], port: int) -> list[socket.socket]:
    """Return one bound socket for each address of the hosts; none of them listens yet.

    `section` is `listen` or `admin`. With port 0 all addresses get the same free port. `::` stands for all addresses of
    both families. Raises `StartError`, whose text names key, value and remedy.
    """
    sockets: list[socket.socket] = []
    try:
        for host in hosts:
            for family, address in _addresses(section, host, port):
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


def _addresses(section: str, host: str, port: int) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
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
