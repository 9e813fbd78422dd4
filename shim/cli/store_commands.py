"""`agent-shim store`: copy a store between file and database, or change a database's number of shards."""

from __future__ import annotations

import os
import sys

import click

from shim.config.loader import load
from shim.config.settings import Store
from shim.errors import StoreError


@click.group("store")
def command() -> None:
    """Copy or divide a store that no shim uses."""


@command.command("copy")
@click.option("--from", "source", required=True, metavar="PATH|URL", help="A file, or postgresql://…")
@click.option("--to", "target", required=True, metavar="PATH|URL", help="The same; it must be empty.")
@click.option("--config", metavar="FILE", help="Its store section says how to reach a database: password, TLS.")
def copy(source: str, target: str, config: str | None) -> None:
    """Copy a store into an empty one. No shim may use either; an interrupted copy leaves nothing behind."""
    from shim.store.copy import copy as carry_out

    try:
        done = carry_out(_store(source, config), _store(target, config))
    except StoreError as error:
        click.echo(f"store copy: {error}", err=True)
        sys.exit(1)
    for table, rows in done.rows.items():
        left_out = done.left_out.get(table, 0)
        click.echo(f"{table}: {rows}" + (f", and {left_out} that cannot be read left out" if left_out else ""))


@command.command("shards")
@click.argument("count", type=click.IntRange(1, 256))
@click.option("--at", "place", required=True, metavar="URL", help="postgresql://…")
@click.option("--config", metavar="FILE", help="Its store section says how to reach the database: password, TLS.")
def shards(count: int, place: str, config: str | None) -> None:
    """Divide a database into COUNT shards: about four for each planned replica. No replica may run."""
    try:
        from shim.store.postgres.offline import change_shards

        before = change_shards(_store(place, config), count)
    except ModuleNotFoundError as error:
        click.echo(f"store shards needs agent-shim[postgres]: {error.name} is not installed", err=True)
        sys.exit(2)
    except StoreError as error:
        click.echo(f"store shards: {error}", err=True)
        sys.exit(1)
    click.echo(f"{count} shards, {before} before")


def _store(place: str, config: str | None) -> Store:
    is_url = place.startswith(("postgresql://", "postgres://"))
    return load(config, os.environ, [f"store.url={place}"] if is_url else ["store.url=", f"store.path={place}"]).store
