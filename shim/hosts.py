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


def is_this_machine(host: str) -> bool:
    """Return True if a connection to the host stays on this machine: loopback, or the path of a socket."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
