"""Commands that change a running shim: drain, purge, redeliver, forget."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from shim.cli.admin_client import AdminPort, admin_options, port_of
from shim.cli.status import drain_line
from shim.clock import pause
from shim.core.text import printable


def order_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select a shim, an agent and a command, and give a reason."""
    for option in (
        click.argument("command_id", metavar="ID"),
        click.option("--reason", default="", metavar="TEXT", help="Goes into the command's trace."),
        click.option("--session", default="", metavar="ID", help="Which agent's, where several know the same id."),
    ):
        command = option(command)
    return admin_options(command)


def give_order(what: str, command_id: str, session: str, reason: str, where: dict[str, Any]) -> None:
    """Execute the order at the admin port. Raises click's error with the shim's reason if it refuses."""
    path = f"/commands/{quote(command_id, safe='')}/{what}"
    port_of(**where).ask("POST", path, {"session": session, "reason": reason})


@click.command("purge")
@order_options
def purge_command(command_id: str, session: str, reason: str, **where: Any) -> None:
    """Give up a command that waits for its agent, and inform the controller. Needs the admin token."""
    give_order("purge", command_id, session, reason, where)
    click.echo(f"{command_id} is given up, and the controller is informed (undeliverable)")


@click.command("redeliver")
@order_options
def redeliver_command(command_id: str, session: str, reason: str, **where: Any) -> None:
    """Queue a command again that was delivered, expired or given up without a result. Needs the admin token."""
    give_order("redeliver", command_id, session, reason, where)
    click.echo(f"{command_id} waits for its agent's next poll")


@click.command("forget")
@admin_options
@click.argument("agent", metavar="AGENT")
def forget_command(agent: str, **where: Any) -> None:
    """Forget an agent that has stopped calling: by its name, its id or its whole key. Needs the admin token.

    Its waiting commands are given up, and the controller is informed (code `expired`). If the agent calls again, it is
    adopted again.
    """
    answer = port_of(**where).ask("POST", f"/agents/{quote(agent, safe='')}/forget")
    click.echo(f"{printable(answer['agent']['id'])} is forgotten")


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
    """Make a running shim refuse new commands and deliver those that it has.

    New commands are refused (code `queue_full`), polls are served, and /readyz answers 503. Needs the admin token.
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
        pause(EVERY_S)
        drain = _state(port)
        if drain_line(drain) != said:
            said = drain_line(drain)
            click.echo(said)
    return 0 if drain["state"] == "drained" else 1


def _state(port: AdminPort) -> dict[str, Any]:
    drain: dict[str, Any] = port.ask("GET", "/status.json")["drain"]
    return drain
