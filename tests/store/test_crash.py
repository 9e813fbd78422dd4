"""SIGKILL at any moment: what was acknowledged is there, and the store opens; on both engines."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from tests.support.databases import TestedDatabase
from tests.support.stores import TIMEOUT_S

ROOT = Path(__file__).parents[2]
ROUNDS = 6
# Puts commands without end and prints the id of each one that is acknowledged.
VICTIM = """
import sys
from shim.core.records import AddTrace, TraceEntry
from shim.errors import StoreError
from tests.support.databases import database_at
from tests.support.stores import KEY, put

round_ = sys.argv[2]
client, _ = database_at(sys.argv[1]).open()
out = sys.stdout
number = 0
while True:
    waiting = []
    for _ in range(20):
        number += 1
        name = f"{round_}-{number}"
        steps = (put(name, payload={"x": "x" * 300}), AddTrace(KEY, (name,), TraceEntry(1.0, "arrived")))
        waiting.append((name, client.submit(*steps)))
    for name, outcome in waiting:
        assert not isinstance(client.wait(outcome), StoreError)
        out.write(name + "\\n")
        out.flush()
"""


def killed_after(place: str, number: int, lines: int) -> list[str]:
    """The ids that a victim had acknowledged; it is killed while it goes on after so many."""
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, place, str(number)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        acked = [victim.stdout.readline().strip() for _ in range(lines)]
        victim.kill()
        # What it wrote before it died counts too; a line without its end was not yet said.
        acked += [line.strip() for line in victim.stdout if line.endswith("\n")]
        victim.wait(TIMEOUT_S)
    return acked


def test_every_acknowledged_command_survives_sigkill(database: TestedDatabase) -> None:
    seeded = random.Random(20261123)
    acked: list[str] = []
    for number in range(ROUNDS):
        acked += killed_after(database.place, number, lines=seeded.randrange(1, 400))
        loaded = database.loaded()
        stored = [record.id for record in loaded.commands]
        assert (loaded.moved_aside, loaded.quarantined) == ("", 0)
        assert set(acked) <= set(stored)
        assert len(stored) == len(set(stored))
    assert len(acked) >= ROUNDS
