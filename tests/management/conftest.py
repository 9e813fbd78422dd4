"""What the status page would show of a world in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from shim.management.status_builder import StatusBuilder
from shim.management.subject import Subject
from shim.management.time_series import Sampler
from tests.bridge.conftest import make_world, pytest_asyncio_loop_factories, world
from tests.support.world import World

__all__ = ["make_world", "pytest_asyncio_loop_factories", "world"]


@dataclass
class Page:
    """The status of one world."""

    world: World
    sampler: Sampler
    snapshots: StatusBuilder

    def status(self, *not_ready: str) -> dict[str, Any]:
        status: dict[str, Any] = msgspec.to_builtins(self.snapshots.take(list(not_ready)))
        return status

    @property
    def sentence(self) -> tuple[str, str]:
        overall = self.status()["overall"]
        return overall["level"], overall["text"]


MakePage = Callable[[World], Page]


@pytest.fixture
def make_page() -> Iterator[MakePage]:
    pages: list[Page] = []

    def make(of: World) -> Page:
        builder = StatusBuilder(Subject.of(of.bridge), {"listen": "127.0.0.1:7080"})
        builder.sampler.start()
        pages.append(Page(of, builder.sampler, builder))
        return pages[-1]

    yield make
    for each in pages:
        each.sampler.stop()


@pytest.fixture
def page(world: World, make_page: MakePage) -> Page:
    """The page of a shim with a configured token, online, without agents."""
    return make_page(world)
