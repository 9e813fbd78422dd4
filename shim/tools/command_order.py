"""What `agent-shim purge` and `agent-shim redeliver` share: one order about one command of a running shim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from shim.tools.admin_client import admin_options, port_of


def order_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which command of which agent on which shim, and why."""
    for option in (
        click.argument("command_id", metavar="ID"),
        click.option("--reason", default="", metavar="TEXT", help="Goes into the command's trace."),
        click.option("--session", default="", metavar="ID", help="Which agent's, where several know the same id."),
    ):
        command = option(command)
    return admin_options(command)


def give_order(what: str, command_id: str, session: str, reason: str, where: dict[str, Any]) -> None:
    """Have it carried out. Raises `AdminError` with the shim's reason where it refuses."""
    path = f"/commands/{quote(command_id, safe='')}/{what}"
    port_of(**where).ask("POST", path, {"session": session, "reason": reason})
