"""Which composition the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from shim.composition import Composition, Surroundings
from shim.errors import StoreError
from shim.ports import CommandStore
from shim.single import Single
from shim.store import Post


def compose(around: Surroundings, make_store: Callable[[Post], CommandStore]) -> Composition:
    """One bridge, or this replica's share of many. Raises `StoreError` where what that needs is not installed."""
    if not around.settings.shards.count:
        return Single(around, make_store(around.post))
    try:
        from shim.shards.cluster import Sharded  # noqa: PLC0415 - an extra, and memory that only gateways pay for
    except ModuleNotFoundError as error:
        raise StoreError(f"shards.count needs the extra agent-shim[nats]: {error.name} is not installed") from error
    return Sharded(around)
