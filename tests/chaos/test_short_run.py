"""A short round of the whole harness, with every kind of fault that fits into it (`make faults` plays more)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import UNMEASURED

SEED = 4
SECONDS = 50


@pytest.mark.timeout(480)
def test_nothing_is_lost_and_nobody_dead_is_reported_alive(tmp_path: Path) -> None:
    figures = tmp_path / "faults.json"
    command = [sys.executable, "-m", "tests.chaos", "--seed", str(SEED), "--seconds", str(SECONDS)]
    done = subprocess.run(
        [*command, "--json", str(figures), "--keep", str(tmp_path / "kept")],
        env=os.environ | UNMEASURED,
        capture_output=True,
        text=True,
        timeout=460,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["violations"] == []
    assert found["commands"]["lost"] == 0
    assert found["commands"]["accepted"] > 10  # it did not prove things about nothing
    assert found["heartbeats"]["upstream"] > 5
    assert found["shim_starts"] > 1
    assert sum(found["faults"].values()) > 20
    assert "commands:" in done.stdout
    assert f"seed {SEED}" in done.stdout
