"""HTTP headers and URLs: parsing and construction."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import SplitResult, quote, urlsplit

from shim.config.settings import Settings
from shim.hosts import plain_host


def bearer(authorization: str | None) -> str | None:
    """Return the Bearer token of an Authorization header: `""` without one, `None` for a malformed one."""
    if authorization is None or authorization[:7].lower() != "bearer ":
        return ""
    token = authorization[7:].strip(" \t")
    return token if token.isascii() and token.isprintable() and " " not in token else None


def header_text(raw: bytes) -> str:
    """Return a part of a head as text that `header_bytes` turns into the same bytes, if they are UTF-8.

    Other bytes are read as Latin-1: aiohttp's client drops what it cannot encode.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def header_bytes(text: str) -> bytes:
    """Return the bytes of a part of a head. In a reply that aiohttp's client has read they are as they came."""
    return text.encode("utf-8", "surrogateescape")


def host_name(host: str) -> str:
    """Return the name or address in a Host header, in lower case, without port, brackets and final dot."""
    name, colon, port = host.lower().rpartition(":")
    if not colon or not port.isdigit() or (":" in name and not name.endswith("]")):
        name = host.lower()
    return name.removeprefix("[").removesuffix("]").rstrip(".")


_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_HTTP = {"ws": "http", "wss": "https"}


def ws_url(base: str, path: str = "") -> str:
    """Return the WebSocket URL of `path` under a base given as http, https, ws or wss.

    A base that already ends in `path` is the endpoint itself, as in the vendor's guide. Path and query of the base are
    kept unchanged; a fragment and user information are dropped. Raises `ValueError`, without the input in its text
    because its query may hold a secret.
    """
    parts, authority = _parse(base)
    whole_path = parts.path
    if path and not _ends_with(whole_path, path):
        whole_path = f"{whole_path.rstrip('/')}/{path.lstrip('/')}"
    return f"{_SCHEMES[parts.scheme]}://{authority}{whole_path}{_query(parts)}"


def http_url(base: str, path: str = "") -> str:
    """Return the base of the HTTP API that belongs to the WebSocket endpoint `path` under `base`.

    The scheme becomes http or https, `path` is removed from the end, and the query is kept. Raises `ValueError` as
    `ws_url` does.
    """
    parts, authority = _parse(base)
    kept = parts.path
    if path and _ends_with(kept, path):
        kept = kept.rstrip("/").removesuffix(f"/{path.strip('/')}")
    return f"{_HTTP[_SCHEMES[parts.scheme]]}://{authority}{kept}{_query(parts)}"


def fallback_url(settings: Settings) -> str:
    """Return the base of the vendor's HTTP API: `fallback.url`, else derived from `upstream.url`."""
    return http_url(settings.fallback.url or settings.upstream.url, settings.upstream.path)


def under(base: str, target: str) -> str:
    """Return the URL of a request target (path and query) under a base. The base's own query comes last."""
    before, mark, query = base.partition("?")
    joint = ("&" if "?" in target else "?") if mark and query else ""
    return f"{before.rstrip('/')}{target}{joint}{query if joint else ''}"


def _parse(base: str) -> tuple[SplitResult, str]:
    """Return a URL's parts and its authority, with the host in ASCII. Raises `ValueError`."""
    try:
        parts = urlsplit(base)
        host, port = _ascii(parts.hostname or ""), parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError("the scheme must be https, wss, http or ws")
    if not host:
        raise ValueError("the URL has no host")
    authority = f"[{host}]" if ":" in host else host
    return parts, authority if port is None else f"{authority}:{port}"


def _ascii(host: str) -> str:
    """Return a host in ASCII. A final dot is kept, because with it the resolver adds no search domain."""
    return host if host.isascii() else plain_host(host)


def _ends_with(path: str, endpoint: str) -> bool:
    name = endpoint.strip("/")
    return bool(name) and path.rstrip("/").endswith(f"/{name}")


def _query(parts: SplitResult) -> str:
    return f"?{parts.query}" if parts.query else ""


def with_query(url: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a URL with query parameters added; its own query is kept unchanged. The URL must have no fragment."""
    added = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs)
    if not added:
        return url
    joint = "" if url.endswith(("?", "&")) else "&" if "?" in url else "?"
    return f"{url}{joint}{added}"


def host_of(url: str) -> str:
    """Return the host of a URL in the normalised form of `hosts.plain_host`; `""` without one."""
    try:
        return plain_host(urlsplit(url).hostname or "")
    except ValueError:
        return ""


def origin_of(url: str) -> str:
    """Return `scheme://host:port` of a URL for a log: without user information, path and query."""
    try:
        parts = urlsplit(url)
        authority = parts.hostname or "?"
        port = parts.port
    except ValueError:
        return "?"
    if ":" in authority:
        authority = f"[{authority}]"
    return f"{parts.scheme}://{authority}" + (f":{port}" if port is not None else "")
