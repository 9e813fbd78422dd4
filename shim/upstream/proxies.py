"""Which proxy a dial goes through, by the environment variables that curl and Go read."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from shim.settings import is_loopback

_VARIABLES = {"wss": ("https_proxy", "all_proxy"), "ws": ("http_proxy", "all_proxy")}
_DEFAULT_PORTS = {"wss": 443, "ws": 80}


def environment_proxy(url: str, environ: Mapping[str, str]) -> str:
    """The proxy URL for a ws/wss URL, `""` for a direct dial.

    Lower-case names win over upper-case ones. As in Go, loopback is never proxied, and `NO_PROXY` may hold names (with
    their subdomains), addresses, networks, `host:port` and `*`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or _is_exempt(host, parts.port or _DEFAULT_PORTS[parts.scheme], _read(environ, "no_proxy")):
        return ""
    for name in _VARIABLES[parts.scheme]:
        value = _read(environ, name)
        if value:
            return value if "://" in value else f"http://{value}"
    return ""


def _read(environ: Mapping[str, str], name: str) -> str:
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    return any(_covers(entry, host, port) for entry in no_proxy.lower().replace(" ", ",").split(",") if entry)


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return ip_address(host) in ip_network(entry, strict=False)
        except ValueError:
            return False
    name, colon, digits = entry.rpartition(":")
    if colon and digits.isdigit() and (":" not in name or name.endswith("]")):
        if int(digits) != port:
            return False
        entry = name
    entry = entry.removeprefix("[").removesuffix("]").removeprefix("*").removeprefix(".")
    return host == entry or host.endswith(f".{entry}")
