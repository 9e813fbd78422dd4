"""The image, built once; and where podman keeps it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import TOOLS, Engine

BUILD_S = 420
"""A first build makes the base image, too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.needs(*TOOLS))
            item.add_marker(pytest.mark.timeout(BUILD_S))


@pytest.fixture(scope="session")
def engine() -> Engine:
    cache = os.environ.get("AGENT_SHIM_CACHE") or Path.home() / ".cache" / "agent-shim"
    return Engine(Path(cache) / "images")


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    return engine.build()


@pytest.fixture
def started(engine: Engine) -> Iterator[list[str]]:
    """Containers (or pods, by `pod:NAME`) that a test started: removed after it."""
    names: list[str] = []
    yield names
    for name in names:
        is_pod, _, rest = name.rpartition(":")
        # With its own volumes, and no others: tests in other processes have just made theirs.
        which = ["--filter", f"pod={rest}"] if is_pod else [rest]
        engine.podman("rm", "-v", "-f", "-t", "1", *which, check=False)
        if is_pod:
            engine.podman("pod", "rm", "-f", rest, check=False)
