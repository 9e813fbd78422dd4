"""Compare host names: one spelling for names that mean the same host."""

from __future__ import annotations

from ipaddress import ip_address


def plain_host(host: str) -> str:
    """Return a host in the spelling that can be compared: lower case, ASCII (IDNA), no brackets, no final dot.

    IP addresses come in their shortest form. Raises `ValueError` for a name that has no ASCII form.
    """
    name = host.removeprefix("[").removesuffix("]").rstrip(".")
    if not name.isascii():
        # yarl is what aiohttp resolves names with; imported here because hardly any configuration has such a name.
        from yarl import URL  # noqa: PLC0415 - see above

        name = URL.build(scheme="https", host=name).raw_host or ""
    try:
        return str(ip_address(name))
    except ValueError:
        return name.lower()


def is_this_machine(host: str) -> bool:
    """Tell whether nobody on the network can listen to a connection: it goes to loopback or to a socket's path."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
