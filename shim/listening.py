"""Bind the addresses of a listener before anything else happens, and say in words why that fails."""

from __future__ import annotations

import errno
import os
import socket

from shim.errors import StartError


def bind(section: str, host: str, port: int) -> list[socket.socket]:
    """Return one bound socket for each address of `host`; none of them listens yet.

    `section` is `listen` or `admin`. With port 0 all addresses get the same free port. Raises `StartError`, which names
    the key, its value and what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise StartError(f"{section}.host {host} has no address: set {section}.host to one of this machine") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made = socket.socket(family, kind, protocol)
            sockets.append(made)
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            made.bind((address[0], taken, *address[2:]))
    except OSError as error:
        for made in sockets:
            made.close()
        raise StartError(_explain(section, host, port, error)) from None
    return sockets


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
