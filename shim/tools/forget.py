"""`agent-shim forget AGENT`."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from shim.core.words import printable
from shim.tools.admin_client import admin_options, port_of


@click.command("forget")
@admin_options
@click.argument("agent", metavar="AGENT")
def forget_command(agent: str, **where: Any) -> None:
    """Forget an agent that does not call any more: its name, its id, or its whole key. Needs the admin token.

    What waits for it is given up, and the controller is told (code `expired`). If it calls again, it is known again.
    """
    answer = port_of(**where).ask("POST", f"/agents/{quote(agent, safe='')}/forget")
    click.echo(f"{printable(answer['agent']['id'])} is forgotten")
