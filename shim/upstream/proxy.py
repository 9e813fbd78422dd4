"""Choice of the proxy for a dial: the configured one, else by the environment variables that curl and Go read."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

import msgspec

from shim.config.settings import DialSettings, is_loopback
from shim.hosts import plain_host

_VARIABLES = {True: ("https_proxy", "all_proxy"), False: ("http_proxy", "all_proxy")}


class ProxyChoice(msgspec.Struct, frozen=True):
    """The proxy of a dial. `url` is `""` for a direct dial; `source` is the setting or rule that decided."""

    url: str = ""
    source: str = ""

    def __repr__(self) -> str:
        return f"ProxyChoice({self.source!r})"


def choose_proxy(url: str, settings: DialSettings, environ: Mapping[str, str]) -> ProxyChoice:
    """Return the proxy for a URL (http, https, ws or wss).

    A configured proxy is always used. In the environment, lower-case names take precedence over upper-case ones. As in
    Go, loopback is never proxied, and `NO_PROXY` may contain names (with their subdomains), addresses, networks,
    `host:port` and `*`.
    """
    if settings.proxy:
        return ProxyChoice(settings.proxy, settings.key("proxy"))
    parts = urlsplit(url)
    secure = parts.scheme in ("https", "wss")
    name, value = next(((each, found) for each in _VARIABLES[secure] if (found := _read(environ, each))), ("", ""))
    if not value:
        return ProxyChoice()
    host = plain_host(parts.hostname or "")
    if is_loopback(host):
        return ProxyChoice(source="loopback is not proxied")
    if _is_exempt(host, parts.port or (443 if secure else 80), _read(environ, "no_proxy")):
        return ProxyChoice(source="NO_PROXY of the environment")
    return ProxyChoice(value if "://" in value else f"http://{value}", f"{name.upper()} of the environment")


def _read(environ: Mapping[str, str], name: str) -> str:
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    return any(_covers(entry, host, port) for entry in no_proxy.replace(",", " ").split())


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    try:
        if "/" in entry:
            return ip_address(host) in ip_network(entry, strict=False)
        name, colon, digits = entry.rpartition(":")
        if colon and digits.isdigit() and (":" not in name or name.endswith("]")):
            if int(digits) != port:
                return False
            entry = name
        name = plain_host(entry.removeprefix("*").removeprefix("."))
    except ValueError:
        return False
    return bool(name) and (host == name or host.endswith(f".{name}"))
