"""PostgreSQL for the parts that need one: a server of their own, as the tests start it, with every commit synced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BINARIES = Path("/usr/lib/postgresql")
STORE_PART = "Commands on PostgreSQL: in, offered, delivered"


def missing() -> str:
    """Return the missing requirement of these parts as a sentence, empty if they can run."""
    if find_spec("psycopg") is None:
        return "agent-shim[postgres] is not installed"
    return "" if any(BINARIES.glob("*/bin/postgres")) else "PostgreSQL's server programs are not installed"


@contextmanager
def running() -> Iterator[Any]:
    """A running server (`tests.support.postgres.Postgres`), deleted at the end."""
    from tests.support import postgres  # noqa: PLC0415 - the driver is an extra

    with postgres.running("shared_buffers = 128MB", "max_wal_size = 2GB", "max_connections = 200") as server:
        yield server


def cpu_s(server: Any) -> float:
    """CPU seconds that the processes of a server have used so far."""
    tasks = [task for pid in server.pids() for task in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
