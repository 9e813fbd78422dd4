"""Clusters by the admin ports of their shims, from a file with one `NAME URL [TOKEN-FILE]` a line."""

from __future__ import annotations

from collections.abc import Iterable

import click
import msgspec

from shim.cli.admin_client import AdminPort, given
from shim.cli.rollout.cluster import Cluster, Status, StatusError, add_status, read_status
from shim.config.loader import read_secret
from shim.errors import ConfigError


class Ports(msgspec.Struct, frozen=True):
    """Admin ports of one cluster: lines of the file, of which those that are none have a reason instead of a URL."""

    name: str
    timeout_s: float
    lines: tuple[tuple[str, str, str], ...]


def read_lines(lines: Iterable[str], token_file: str, timeout_s: float) -> list[Ports]:
    """Return the clusters that the lines name. Lines with the same name are shims of one cluster.

    A line may be a URL alone; its host and port are the name then.
    """
    found: dict[str, dict[tuple[str, str, str], None]] = {}
    for line in lines:
        words = line.split()
        if len(words) == 1:
            words = [(line.partition("://")[2] or line).rpartition("@")[2], line]
        url, file = words[1], words[2] if len(words) == 3 else token_file
        reason = "" if len(words) <= 3 else f"not `NAME URL [TOKEN-FILE]` but {len(words)} words"
        if "@" in url:
            # The text of the line is shown nowhere: it may hold a password.
            url, reason = "", "the URL has a user: an admin port takes a token, from TOKEN-FILE or --token-file"
        found.setdefault(words[0], {})[url, file, reason] = None
    return [Ports(name, timeout_s, tuple(ports)) for name, ports in found.items()]


def cluster(ports: Ports) -> Cluster:
    """Return what the shims of one cluster report. Every failure is a gap of the row."""
    row = Cluster(name=ports.name)
    for url, token_file, reason in ports.lines:
        try:
            if reason:
                raise StatusError(reason)
            add_status(row, _status(url, token_file, ports.timeout_s))
        except (click.ClickException, ConfigError, StatusError) as error:
            text = error.message if isinstance(error, click.ClickException) else str(error)
            row.gaps.append(f"{url}: {text}" if url and url not in text else text)
    return row


def _status(url: str, token_file: str, timeout_s: float) -> Status:
    try:
        host, port = given(url)
    except click.BadParameter as error:
        raise StatusError(error.message) from None
    token = read_secret(token_file, "the token file") if token_file else ""
    return read_status(AdminPort(host, port, token, timeout_s).ask("GET", "/status.json"))
