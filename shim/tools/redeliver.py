"""`agent-shim redeliver ID`."""

from __future__ import annotations

from typing import Any

import click

from shim.tools.command_order import give_order, order_options


@click.command("redeliver")
@order_options
def redeliver_command(command_id: str, session: str, reason: str, **where: Any) -> None:
    """Queue a command again that was delivered, expired or given up without a result. Needs the admin token."""
    give_order("redeliver", command_id, session, reason, where)
    click.echo(f"{command_id} waits for its agent's next poll")
