"""`agent-shim demo`: controller, shim and unmodified legacy agents in one terminal, over a real WebSocket."""

from __future__ import annotations

import sys

import click


@click.command("demo")
@click.option("--once", is_flag=True, help="End after the last step; exit 1 if one failed.")
@click.option("--gateway", is_flag=True, help="Two replicas on one PostgreSQL; the owner of a link is killed.")
@click.option("--no-color", is_flag=True, help="No colours; so does NO_COLOR, and output that is no terminal.")
def command(once: bool, gateway: bool, no_color: bool) -> None:
    """Run a controller, a shim and one legacy agent in this terminal, step by step, then leave them running.

    With --gateway: two replicas on a PostgreSQL of this machine's packages, and six agents.
    """
    from devtools.demo.main import play

    sys.exit(play(once=once, colour=not no_color, gateway=gateway))
