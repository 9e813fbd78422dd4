"""`agent-shim purge ID`."""

from __future__ import annotations

from typing import Any

import click

from shim.tools.command_order import give_order, order_options


@click.command("purge")
@order_options
def purge_command(command_id: str, session: str, reason: str, **where: Any) -> None:
    """Give up a command that waits for its agent; the controller is told. Needs the admin token."""
    give_order("purge", command_id, session, reason, where)
    click.echo(f"{command_id} is given up, and the controller is told (undeliverable)")
