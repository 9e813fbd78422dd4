"""`agent-shim health`: one request to the admin port of a running shim, for health checks of containers and units.

The request uses the standard library only, because a check every few seconds must be cheap.
"""

from __future__ import annotations

import os
import sys
from http.client import HTTPException

import click

from shim.cli.admin_client import WHOLE_S, AdminPort, configured, given
from shim.clock import Clock, pause
from shim.config.loader import load

_SHOWN_BYTES = 300
_PAUSE_S = 0.2


@click.command("health")
@click.option("--config", metavar="FILE", help="The shim's configuration: it says where the admin port is.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As given to `run`.")
@click.option("--url", metavar="URL", help="The admin port itself, http://host:port, instead of a configuration.")
@click.option("--ready", is_flag=True, help="Ask whether it can serve (/readyz), not only whether it lives (/healthz).")
@click.option("--wait", "wait_s", type=click.FloatRange(0, 600), default=0, metavar="S", help="Ask again for so long.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1, 60), default=3, show_default=True, metavar="S")
def command(
    config: str | None, sets: tuple[str, ...], url: str | None, ready: bool, wait_s: float, timeout_s: float
) -> None:
    """Check a running shim: exit code 0 if it is healthy, 1 if it is not or does not answer."""
    host, port = given(url) if url else configured(load(config, os.environ, sets).admin)
    path, clock = "/readyz" if ready else "/healthz", Clock()
    end_s = clock.monotonic_s() + wait_s
    well, text = ask(host, port, path, timeout_s)
    while not well and clock.monotonic_s() < end_s:
        pause(_PAUSE_S)
        well, text = ask(host, port, path, timeout_s)
    click.echo(text, err=not well)
    sys.exit(0 if well else 1)


def ask(host: str, port: int, path: str, timeout_s: float) -> tuple[bool, str]:
    """Send GET `path`; return True if the answer was 200, and a sentence for people."""
    try:
        admin_port = AdminPort(host, port, timeout_s=timeout_s, whole_s=max(WHOLE_S, timeout_s))
        status, body = admin_port.exchange("GET", path, limit_bytes=_SHOWN_BYTES)
    except (OSError, HTTPException) as error:
        return False, f"no answer from the admin port {host}:{port}: {str(error) or type(error).__name__}"
    return status == 200, body.strip() if status == 200 else f"{status} {body.strip()}"
