"""Which composition the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from shim.composition import Runtime, RuntimeContext
from shim.errors import StoreError
from shim.ports import CommandStore
from shim.single import SingleRuntime
from shim.store import CallThreadsafe


def build_runtime(around: RuntimeContext, make_store: Callable[[CallThreadsafe], CommandStore]) -> Runtime:
    """Build one bridge with its store, or a replica's share of many. Raises `StoreError` where an extra is missing."""
    if around.settings.store.url:
        try:
            from shim.cluster.replica import Replica  # noqa: PLC0415 - an extra, and memory that only clusters pay for
        except ModuleNotFoundError as error:
            raise StoreError(f"store.url needs agent-shim[postgres]: {error.name} is not installed") from error
        return Replica(around)
    return SingleRuntime(around, make_store(around.post))
