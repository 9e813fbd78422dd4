"""docs/contributing/state-machines.md shows what the tables say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from shim.core import command_queue
from shim.core.link_state import LinkState
from shim.core.records import CommandState

ROOT = Path(__file__).parents[2]


def test_the_diagrams_are_drawn_from_the_tables() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_state_and_every_change_of_a_command_is_drawn() -> None:
    text = (ROOT / "docs/contributing/state-machines.md").read_text(encoding="utf-8")
    for state in (*LinkState, *CommandState):
        assert re.search(rf"--> {state.name}\b", text), state
    for (before, step), after in command_queue.TRANSITIONS.items():
        if before != after:
            assert re.search(rf"^ +{before.name} --> {after.name}: .*\b{step.value}\b", text, re.MULTILINE)
