"""Where an admin port can be reached, as the command line or the configuration says it."""

from __future__ import annotations

from urllib.parse import urlsplit

import click

_UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - addresses to listen on


def given(url: str) -> tuple[str, int]:
    """Host and port of `--url`. Raises click's error for anything but http://host:port."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or 80
    except ValueError:
        pass
    raise click.BadParameter("expected http://host:port", param_hint="--url")


def configured(host: str, port: int) -> tuple[str, int]:
    """Where a shim that listens there can be reached from this machine. Raises click's error where nobody can know."""
    if not port:
        raise click.UsageError("admin.port is 0, any free port: give --url")
    return reachable(host), port


def reachable(host: str) -> str:
    """The address to call for a server that listens on `host`."""
    return _UNSPECIFIED.get(host, host)
