"""`agent-shim drain`: let a running shim hand over what it has and take nothing new, before it is removed."""

from __future__ import annotations

import sys
from threading import Event
from typing import Any

import click

from shim.tools.admin_client import AdminPort, admin_options, port_of
from shim.tools.status_view import drain_line

EVERY_S = 0.5


@click.command("drain")
@admin_options
@click.option("--wait", is_flag=True, help="Wait for the end: exit code 0 if it is empty, 1 if not in time.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 86_400),
    default=300,
    show_default=True,
    metavar="S",
    help="How long it may take until it counts as failed; no command is lost either way.",
)
@click.option("--cancel", is_flag=True, help="Take commands again.")
def drain_command(wait: bool, timeout_s: float, cancel: bool, **where: Any) -> None:
    """Tell a running shim to take no new commands and to hand over what it has.

    New commands are refused (code `queue_full`), polls are served, and /readyz says 503. Needs the admin token.
    """
    port = port_of(**where)
    if cancel:
        port.ask("DELETE", "/drain")
        click.echo("not draining: commands are taken again")
        return
    port.ask("POST", "/drain", {"timeout_s": timeout_s})
    drain = _state(port)
    click.echo(drain_line(drain))
    if wait:
        sys.exit(_wait(port, drain))


def _wait(port: AdminPort, drain: dict[str, Any]) -> int:
    said = drain_line(drain)
    while drain["state"] == "draining":
        Event().wait(EVERY_S)
        drain = _state(port)
        if drain_line(drain) != said:
            said = drain_line(drain)
            click.echo(said)
    return 0 if drain["state"] == "drained" else 1


def _state(port: AdminPort) -> dict[str, Any]:
    drain: dict[str, Any] = port.ask("GET", "/status.json")["drain"]
    return drain
