"""Description of the machine that measured the figures."""

from __future__ import annotations

import os
import platform
import sqlite3
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from shim import __version__


def described() -> dict[str, str]:
    """The machine and the software, by name."""
    return {
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {_memory_gb():.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": f"aiohttp {version('aiohttp')}, uvloop {version('uvloop')}, SQLite {sqlite3.sqlite_version}",
        "shim": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def load() -> float:
    """Return the mean number of processes that were ready to run in the last minute."""
    return os.getloadavg()[0]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
