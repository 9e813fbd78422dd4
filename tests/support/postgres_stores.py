"""Stores on a PostgreSQL of the test's own, closed by `tests/store/postgres/conftest.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import postgres as pg
from tests.support.stores import StoreClient

OPEN: list[StoreClient] = []


ROOT = Path(__file__).parents[2]


def client_of(url: str, **how: Any) -> StoreClient:
    OPEN.append(StoreClient(lambda post: pg.store(url, post, **how)))
    OPEN[-1].open()
    return OPEN[-1]


def stored(url: str) -> list[str]:
    return [row[0] for row in pg.query(url, "SELECT id FROM commands ORDER BY seq")]


OWNER = """
import sys
from shim.errors import StoreFenced
from tests.support import postgres
from tests.support.stores import StoreClient, put
client = StoreClient(lambda post: postgres.store(sys.argv[1], post, process=sys.argv[2]))
client.open()
number = 0
while True:
    waiting = []
    for _ in range(10):
        number += 1
        waiting.append((f"{sys.argv[2]}-{number}", client.submit(put(f"{sys.argv[2]}-{number}"))))
    for name, outcome in waiting:
        found = client.wait(outcome)
        if isinstance(found, StoreFenced):
            print("fenced", flush=True)
            sys.exit(0)
        print(name, flush=True)
"""


def owner(url: str, process: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", OWNER, url, process], cwd=ROOT, stdout=subprocess.PIPE, text=True)
