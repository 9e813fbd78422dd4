"""Clusters as the report sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shim.cli.rollout.cluster import Cluster, Measured
from shim.management.objectives import OBJECTIVES

NOW = 1_800_000_000.0
DAY_S = 86_400.0

MakeCluster = Callable[..., Cluster]


def measured(good: int = 1000, samples: int = 1000, **others: tuple[int, int]) -> dict[str, Measured]:
    """All four objectives with these counts; `others` by name."""
    return {each.name: Measured(each.target, *others.get(each.name, (good, samples))) for each in OBJECTIVES}


def well(name: str = "prod", **given: Any) -> Cluster:
    """A cluster that has been in for more than a day and is well, but for what is given."""
    fields: dict[str, Any] = {
        "name": name,
        "shims": 1,
        "versions": ["1.0"],
        "modes": ["websocket"],
        "percent": 10.0,
        "since": NOW - DAY_S - 1,
        "inside": 1,
        "agents": 1,
        "links": {"up": 1},
        "objectives": {"1h": measured(), "24h": measured()},
        "keep_reasons": ["1 agent called"],
    }
    return Cluster(**(fields | given))


@pytest.fixture
def make_cluster() -> MakeCluster:
    """Return the maker of clusters that are well but for what is given."""
    return well
