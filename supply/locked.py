"""The locked requirements, and the packages among them that apply to this interpreter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ROOT / "requirements" / "run.txt"
RUN_OTEL = ROOT / "requirements" / "run-otel.txt"
_PINNED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Package:
    """A package at one version; its name is normalised as in PEP 503."""

    name: str
    version: str


def packages(path: Path = RUN) -> Iterator[Package]:
    """Yield the packages that a requirements file pins."""
    for match in _PINNED.finditer(path.read_text()):
        yield Package(normalised(match["name"]), match["version"])


def normalised(name: str) -> str:
    """The name of a package as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
