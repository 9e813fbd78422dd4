"""`agent-shim doctor`: what stands between this machine and a working shim, line by line, with what to do.

It changes nothing, registers nothing upstream, and shows no secret.
"""

from __future__ import annotations

import os
import sys

import click

from shim import config as configuration
from shim.errors import ConfigError
from shim.logs import Redaction
from shim.tools.admin_address import given


@click.command("doctor")
@click.option("--config", metavar="FILE", help="The shim's configuration; without it, defaults and environment.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="As given to `run`.")
@click.option("--token-file", metavar="FILE", help="Holds the token to examine instead of the configured one.")
@click.option("--admin-token-file", metavar="FILE", help="Holds the admin token; default: admin.token_file.")
@click.option("--url", metavar="URL", help="The running shim's admin port, http://host:port; default: as configured.")
@click.option("--dial", is_flag=True, help="Try the WebSocket also while the running shim's link is online.")
@click.option(
    "--cluster", metavar="NAMESPACE", help="Also find agents without the shim, with kubectl; `all`: everywhere."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(  # noqa: PLR0913, PLR0917 - one parameter per option
    config: str | None,
    sets: tuple[str, ...],
    token_file: str | None,
    admin_token_file: str | None,
    url: str | None,
    dial: bool,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Examine DNS, TCP, TLS, proxy, WebSocket, token, clock, ports, store and the running shim.

    Exit code 1 if a line says FAIL.
    """
    from shim.tools.doctor import cluster as pods  # noqa: PLC0415 - the command list must not load it
    from shim.tools.doctor import examine  # noqa: PLC0415 - as above
    from shim.tools.doctor.findings import Report  # noqa: PLC0415 - as above

    redaction = Redaction()
    report = Report(redaction)
    try:
        settings = configuration.load(config, os.environ, sets)
        path = admin_token_file or settings.admin.token_file
        admin_token = configuration.read_secret(path, "admin.token_file") if path else ""
    except ConfigError as error:
        report.add(examine.faults(error))
    else:
        for secret in (*configuration.secrets(settings), admin_token):
            redaction.add(secret)
        shim = examine.running_shim(settings, given(url) if url else None, admin_token)
        found, token = examine.examine(settings, shim, token_file, os.environ, dial=dial)
        redaction.add(token)
        report.add([examine.configuration(config, settings), *found])
    if cluster:
        report.add(pods.examine(cluster))
    click.echo(report.json() if as_json else "\n".join(report.lines()))
    sys.exit(0 if report.ok else 1)
