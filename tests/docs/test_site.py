"""The site is built from docs/ without a warning, and its build refuses dead links and pages that nothing leads to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import UNMEASURED

ROOT = Path(__file__).parents[2]
SOURCES = (
    "docs",
    "config",
    "mkdocs.yml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "helm/agent-shim",
    "helm/examples",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy what the site is built from."""
    for name in SOURCES:
        goal = tmp_path / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, goal)
    return tmp_path


def build(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build"]
    environment = os.environ | UNMEASURED
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_site_needs_no_other_host_and_shows_every_list_as_one(project: Path) -> None:
    done = build(project)
    assert done.returncode == 0, done.stderr
    pages = list((project / "build" / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]+)"', page.read_text())
        assert [each for each in fetched if re.match(r"(?:https?:)?//", each)] == [], page.name
        # Python-Markdown wants an empty line before a list; GitHub does not.
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text(), re.DOTALL)
        lists = [
            each for each in paragraphs if re.search(r"^ *(?:[-*]|\d+\.) ", each, re.MULTILINE) and "<pre>" not in each
        ]
        assert lists == [], page.name


@pytest.mark.parametrize(
    "page,text",
    [
        ("docs/index.md", "[nowhere](get-started/nowhere.md)"),
        ("docs/index.md", "[no heading](how-to/canary.md#no-such-heading)"),
        ("docs/index.md", "[not in the repository](../NOWHERE.md)"),
        ("docs/how-to/" + "orphan.md", "# A page that nothing leads to"),
    ],
)
def test_the_build_fails_for(page: str, text: str, project: Path) -> None:
    with (project / page).open("a") as file:
        file.write(f"\n{text}\n")
    done = build(project)
    assert done.returncode != 0
    assert "WARNING" in done.stderr
