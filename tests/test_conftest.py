"""The suite's own guards: they are run over tests that must fail or be skipped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.processes import UNMEASURED

ROOT = Path(__file__).parent.parent

BLOCKING = """
import asyncio, time

async def test_blocks_the_loop():
    time.sleep(2)

async def test_waits_on_the_loop():
    await asyncio.sleep(0)
"""

NEEDING = """
import pytest

@pytest.mark.needs("no-such-program", "npm:no-such-package")
def test_needs_what_is_missing(): ...

@pytest.mark.needs("sh")
def test_needs_what_is_there(): ...
"""


DRAWING = """
import importlib
from pathlib import Path

from hypothesis import given, strategies as st

drawn = []

@given(st.integers(), st.text())
def draw(number, text):
    drawn.append((number, text))

def test_examples_do_not_depend_on_imported_modules(monkeypatch):
    draw()
    before, drawn[:] = list(drawn), []
    here = Path(__file__).parent.parent  # it takes nothing out of a folder of tests
    (here / "imported_later.py").write_text("NUMBERS = [" + ", ".join(str(n * 7919) for n in range(500)) + "]")
    monkeypatch.syspath_prepend(here)
    importlib.import_module("imported_later")
    draw()
    assert drawn == before
"""

FALSE = """
from hypothesis import given, strategies as st

@given(st.lists(st.integers()))
def test_a_sum_is_small(numbers):
    print("tried", numbers)
    assert sum(numbers) < 1000
"""


def run(tmp_path: Path, source: str, *, require_tools: bool = False) -> tuple[dict[str, int], str]:
    """Run pytest with this suite's settings over one file; returns the counts of its last line and its output."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_guarded.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", str(folder)],
        env=os.environ | UNMEASURED | {"CI": "true", "AGENT_SHIM_REQUIRE_TOOLS": "1" * require_tools, "PY_COLORS": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout.splitlines()[-1])
    return {word: int(number) for number, word in counts}, done.stdout


def test_a_test_that_blocks_the_event_loop_fails(tmp_path: Path) -> None:
    counts, output = run(tmp_path, BLOCKING)
    assert counts == {"passed": 2, "error": 1}
    assert "ERROR at teardown of test_blocks_the_loop" in output
    assert "the event loop was blocked: <Handle" in output


def test_a_missing_tool_skips_a_test_and_says_so(tmp_path: Path) -> None:
    counts, output = run(tmp_path, NEEDING)
    assert counts == {"passed": 1, "skipped": 1}
    assert "needs no-such-program, npm:no-such-package" in output


def test_a_missing_tool_fails_a_test_where_all_must_be_there(tmp_path: Path) -> None:
    counts, _ = run(tmp_path, NEEDING, require_tools=True)
    assert counts == {"passed": 1, "error": 1}


def test_the_gate_draws_the_same_examples_whatever_was_imported(tmp_path: Path) -> None:
    counts, output = run(tmp_path, DRAWING)
    assert counts == {"passed": 1}, output


def test_the_gate_shows_a_failing_example_without_shrinking_it(tmp_path: Path) -> None:
    counts, output = run(tmp_path, FALSE)
    assert counts == {"failed": 1}
    assert "reproduce_failure" in output
    tried = re.findall(r"^tried (.*)$", output, re.MULTILINE)
    wrong = [numbers for numbers in tried if sum(json.loads(numbers)) >= 1000]
    assert len(set(wrong)) == 1, "no smaller one was looked for"
