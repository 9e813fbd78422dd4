"""Comparison of host names: one spelling for all names of the same host."""

from __future__ import annotations

from ipaddress import ip_address


def plain_host(host: str) -> str:
    """Return a host in normalised form: lower case, ASCII (IDNA), without brackets and final dot.

    IP addresses are returned in their shortest form. Raises `ValueError` for a name without an ASCII form.
    """
    name = host.removeprefix("[").removesuffix("]").rstrip(".")
    if not name.isascii():
        # yarl's conversion is the one that aiohttp uses. It is imported here because few configurations need it.
        from yarl import URL  # noqa: PLC0415 - see above

        name = URL.build(scheme="https", host=name).raw_host or ""
    try:
        return str(ip_address(name))
    except ValueError:
        return name.lower()


def host_and_port(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address: without them nobody knows where its port begins."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return True for `localhost` and loopback addresses, with or without brackets: no other host is reached by them.

    A name below `localhost`, or one with a final dot, may be any host: many resolvers ask name servers for it.
    """
    try:
        name = plain_host(host)
    except ValueError:
        return False
    if host.endswith("."):
        return False
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def is_this_machine(host: str) -> bool:
    """Return True if a connection to a database's host stays on this machine: loopback, or the path of a socket.

    PostgreSQL's library passes names to the resolver as they are, so names beyond ASCII are not converted here.
    """
    return not host or host.startswith(("/", "@")) or (host.isascii() and is_loopback(host))
