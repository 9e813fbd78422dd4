"""What request headers say, for every HTTP port of the shim."""

from __future__ import annotations


def bearer(authorization: str | None) -> str | None:
    """The Bearer token of an Authorization header: `""` if there is none, `None` if it cannot be one."""
    if authorization is None or authorization[:7].lower() != "bearer ":
        return ""
    token = authorization[7:].strip(" \t")
    return token if token.isascii() and token.isprintable() and " " not in token else None


def host_name(host: str) -> str:
    """The name or address in a Host header, in lower case, without port, brackets and final dot."""
    name, colon, port = host.lower().rpartition(":")
    if not colon or not port.isdigit() or (":" in name and not name.endswith("]")):
        name = host.lower()
    return name.removeprefix("[").removesuffix("]").rstrip(".")
