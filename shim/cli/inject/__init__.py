"""`agent-shim inject`: add the sidecar to a manifest of the vendor's agent, or remove it."""

from __future__ import annotations

import difflib
import re
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from shim import __version__
from shim.cli.inject import documents, missing_sidecars
from shim.cli.inject.settings import PodSettings
from shim.cli.inject.settings import read as read_settings
from shim.cli.inject.sidecar import NAME
from shim.cli.standard_input import standard_input
from shim.config.files import reason

_IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9._-]+(?:/[a-z0-9._-]+)*(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)


@click.command("inject")
@click.option("-f", "--filename", metavar="FILE", default="-", help="The manifest; - or nothing: standard input.")
@click.option("--image", default="", metavar="IMAGE", help="Where your clusters pull the sidecar from. Required.")
@click.option("--container", default="", metavar="NAME", help="The agent's container, if it is none of the vendor's.")
@click.option("--own-token", is_flag=True, help="Use the token that the agent sends instead of reading its Secret.")
@click.option("--config-map", default=NAME, show_default=True, metavar="NAME", help="The shim's configuration.")
@click.option("--no-config", is_flag=True, help="Do not write that ConfigMap: the chart's release has it.")
@click.option("--config", "path", metavar="FILE", help="Settings of the shim to write into that ConfigMap.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One more setting; overrides the file.")
@click.option("--remove", is_flag=True, help="Take the sidecar out again.")
@click.option("--dry-run", is_flag=True, help="Print what would change instead of the manifest.")
@click.option("--check", is_flag=True, help="Read `kubectl get pods -o json`: exit code 1 if an agent is without it.")
def command(  # noqa: PLR0913, PLR0917 - one for each option
    filename: str,
    image: str,
    container: str,
    own_token: bool,
    config_map: str,
    no_config: bool,
    path: str | None,
    sets: tuple[str, ...],
    remove: bool,
    dry_run: bool,
    check: bool,
) -> None:
    """Add the sidecar to the agent's manifest and print the result. A second run changes nothing."""
    if (path or sets) and (no_config or remove or check):
        raise click.UsageError(
            "--config and --set are for the ConfigMap that is written: not with --no-config, --remove, --check"
        )
    if not (remove or check) and not _IMAGE.fullmatch(image):
        # A native sidecar whose image cannot be pulled keeps the agent from starting.
        raise click.UsageError(
            f"--image must say where your clusters pull the sidecar from: registry.example.com/{NAME}:{__version__}, "
            f"or {NAME}:{__version__} where the nodes have the image already"
        )
    try:
        # Read as bytes: reading text would turn CRLF into LF.
        data = standard_input().read() if filename == "-" else Path(filename).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise click.ClickException(f"{filename} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{filename} cannot be read: {reason(error)}") from None
    if check:
        _check(text)
    settings = read_settings(path, sets, own_token) if path or sets else PodSettings()
    options = documents.Options(image, container, config_map, not no_config, own_token, settings)
    after = documents.remove(text) if remove else documents.inject(text, options, partial(click.echo, err=True))
    if dry_run:
        name = "stdin" if filename == "-" else filename
        before, new = text.splitlines(keepends=True), after.splitlines(keepends=True)
        after = "".join(
            difflib.unified_diff(before, new, name, f"{name} with the sidecar{'' if not remove else ' removed'}")
        )
    click.echo(after.encode("utf-8"), nl=False)


def _check(text: str) -> NoReturn:
    agents = missing_sidecars.agents(missing_sidecars.listed(text))
    for pod in agents:
        click.echo(f"{pod.namespace}/{pod.name}: {pod.fault or ('opted out' if pod.opted_out else 'ok')}")
    if not agents:
        click.echo("no agent is running here")
    sys.exit(1 if any(pod.fault for pod in agents) else 0)
