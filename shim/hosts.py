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


def is_loopback(host: str) -> bool:
    """Return True for `localhost`, its subdomains (RFC 6761) and loopback addresses, with or without brackets."""
    try:
        name = plain_host(host)
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def is_this_machine(host: str) -> bool:
    """Return True if a connection to a database's host stays on this machine: loopback, or the path of a socket.

    Of names only `localhost` itself counts: PostgreSQL's library asks name servers for `localhost.` and its subdomains.
    """
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
