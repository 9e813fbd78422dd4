"""The suite's own guards: they are run over tests that must fail or be skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def run(tmp_path: Path, source: str, *, require_tools: bool = False) -> tuple[dict[str, int], str]:
    """Run pytest with this suite's settings over one file; returns the counts of its last line and its output."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_guarded.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", str(folder)],
        env={**os.environ, "AGENT_SHIM_REQUIRE_TOOLS": "1" if require_tools else "", "PY_COLORS": "0"},
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
