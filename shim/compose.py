"""Which composition the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from shim.composition import Composition, Surroundings
from shim.ports import CommandStore
from shim.single import Single
from shim.store import Post


def compose(around: Surroundings, make_store: Callable[[Post], CommandStore]) -> Composition:
    """Build one bridge with its store."""
    return Single(around, make_store(around.post))
