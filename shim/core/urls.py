"""URLs of the upstream: schemes, base paths, queries (protocol.md §2)."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote, urlsplit

_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


def ws_url(base: str, path: str = "") -> str:
    """The WebSocket URL of `path` under a base given as http, https, ws or wss.

    The base's own path and query stay, byte for byte; a fragment and user information go. Raises `ValueError` without
    echoing the input, which may carry a secret in its query.
    """
    try:
        parts = urlsplit(base)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    scheme = _SCHEMES.get(parts.scheme.lower())
    if scheme is None:
        raise ValueError("the scheme must be https, wss, http or ws")
    if not host:
        raise ValueError("the URL has no host")
    authority = f"[{host}]" if ":" in host else host
    if port is not None:
        authority += f":{port}"
    query = f"?{parts.query}" if parts.query else ""
    whole_path = parts.path
    if path:
        whole_path = f"{parts.path.rstrip('/')}/{path.lstrip('/')}"
    return f"{scheme}://{authority}{whole_path}{query}"


def with_query(url: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Add query parameters to a URL without a fragment; what it has is left as it is."""
    added = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs)
    if not added:
        return url
    joint = "" if url.endswith(("?", "&")) else "&" if "?" in url else "?"
    return f"{url}{joint}{added}"


def host_of(url: str) -> str:
    """The host of a URL in lower case, without brackets; `""` if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def origin_of(url: str) -> str:
    """`scheme://host:port` as it may be logged: no user information, path or query."""
    try:
        parts = urlsplit(url)
        authority = parts.hostname or "?"
        port = parts.port
    except ValueError:
        return "?"
    if ":" in authority:
        authority = f"[{authority}]"
    return f"{parts.scheme}://{authority}" + (f":{port}" if port is not None else "")
