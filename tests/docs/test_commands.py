"""The shell commands of the documents that can run here do run, beside a running shim with an agent."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from shim.config.loader import leaves, sections
from tests.e2e.test_main_job import living
from tests.support.processes import TOKEN, Shim, free_port, world

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADMIN = "token-of-the-admin-port"

# Their blocks are run in this order, as one operator would: install, canary, rollback, removal.
OPERATIONS = (
    *("get-started/servers.md", "how-to/canary.md", "how-to/migrate-many-clusters.md"),
    *("how-to/rollback.md", "how-to/removal.md"),
)
LOAD_TEST = "how-to/load-test.md"
ALONE = ("concepts/faq.md",)
NOTHING_TO_RUN = ("how-to/diagnose.md",)
"""Pages whose names are checked and whose commands are not run."""


def blocks(name: str) -> list[str]:
    """The blocks of a page that are marked `sh run`, without the indentation of a list around them."""
    text = (DOCS / name).read_text()
    found = re.findall(r"^( *)```sh run\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


async def run(block: str, folder: Path, **variables: str) -> str:
    """A block as a person would run it, in a directory with `agent-shim.yaml` and the project's `config`."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", block),
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    assert process.returncode == 0, f"{block}\n{output.decode()}"
    return output.decode()


def prepare(folder: Path) -> None:
    (folder / "bin").mkdir()
    program = folder / "bin" / "agent-shim"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m shim "$@"\n')
    program.chmod(0o755)
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "admin-token").write_text(ADMIN)


@pytest.mark.needs("bash", "promtool")
@pytest.mark.timeout(300)
async def test_operations(tmp_path: Path) -> None:
    prepare(tmp_path)
    async with world(tmp_path) as (_, controller):
        config = {
            "mode": "websocket",
            "rollout": {"percent": 10},
            "fallback": {"url": controller.url},
            "upstream": {"url": controller.url, "token": TOKEN},
            "listen": {"port": free_port()},
            "admin": {"port": free_port(), "token_file": str(tmp_path / "admin-token")},
            "store": {"path": str(tmp_path / "agent-shim.db")},
        }
        async with Shim(tmp_path, config) as shim:
            path = tmp_path / "agent-shim.yaml"
            await shim.start()
            (tmp_path / "clusters.txt").write_text(f"prod {shim.admin} admin-token\n")
            (tmp_path / "clusters-by-name.txt").write_text("prod-cluster\nbank-eu\nstaging\n")
            async with living(shim, "clusters_agent"):
                await controller.until(type="register", direction="in")
                seen = 0
                for block in [block for page in OPERATIONS for block in blocks(page)]:
                    before, after = path.read_text(), len(shim.lines)
                    output = await run(block, tmp_path)
                    assert TOKEN not in output
                    assert ADMIN not in output
                    seen += 1
                    if path.read_text() != before:
                        reloaded = await shim.event("config_reloaded", after)
                        assert reloaded["needs_restart"] == []
                        told = json.loads(await run("agent-shim status --config agent-shim.yaml --json", tmp_path))
                        now = yaml.safe_load(path.read_text())
                        assert (told["mode"], told["rollout_percent"]) == (now["mode"], now["rollout"]["percent"])
                assert seen >= 8


@pytest.mark.needs("bash", "curl")
@pytest.mark.timeout(300)
async def test_the_load_test(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    async with world(tmp_path) as (shim, controller):
        await shim.start()
        names = {"SHIM": shim.url, "ADMIN": shim.admin, "CONTROLLER": controller.url}
        outputs = [await run(block, tmp_path, **names) for block in blocks(LOAD_TEST)]
        await shim.event("link_lost")
        assert not any(TOKEN in output for output in outputs)
    assert len(outputs) == 4
    for name in ("agents", "commands", "cut"):
        assert json.loads((tmp_path / f"{name}.json").read_text())
    assert "Migration to the WebSocket API" in (tmp_path / "load-test.html").read_text()


@pytest.mark.needs("bash")
@pytest.mark.parametrize("name", ALONE)
async def test_what_needs_no_shim(name: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "agent-shim.yaml").write_text("mode: websocket\n")
    assert blocks(name)
    for block in blocks(name):
        await run(block, tmp_path)


def test_the_pages_name_only_configuration_that_exists() -> None:
    known = {path for path, _, _ in leaves()} | sections()
    for page in (*OPERATIONS, LOAD_TEST, "how-to/tokens.md", *ALONE, *NOTHING_TO_RUN, "reference/metrics.md"):
        named = set(
            re.findall(
                r"`((?:upstream|listen|admin|poll|commands|store|log|fallback|rollout|sunset|notify|telemetry|identity|"
                r"heartbeat|register|sessions)\.[a-z_.]+)`",
                (DOCS / page).read_text(),
            )
        )
        assert named <= known, (page, named - known)


def test_the_pages_name_only_log_events_that_exist() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "shim").rglob("*.py"))
    events = set(re.findall(r'log\.(?:debug|info|warning|error|exception)\(\s*"([a-z_]+)"', source)) | {"link_state"}
    for page in (*OPERATIONS, LOAD_TEST, *ALONE, *NOTHING_TO_RUN):
        text = (DOCS / page).read_text()
        named = {
            word
            for group in re.findall(r"[Ll]og ((?:line )?`[a-z_]+`(?:(?:,| or| and) `[a-z_]+`)*)", text)
            for word in re.findall(r"`([a-z_]+)`", group)
        }
        assert named - events - {"link", "command"} == set(), (page, named - events)
    assert "link_lost" in events


def test_the_guides_questions_are_answered() -> None:
    answered = re.findall(r"^\| \*\*(.+?)\*\* \|", (DOCS / "concepts" / "faq.md").read_text(), re.MULTILINE)
    assert len(answered) == 7


@pytest.mark.needs("make")
@pytest.mark.parametrize("target", ["faults", "faults GATEWAY=1", "bench", "walks", "house", "check", "audit", "demo"])
def test_what_make_runs_exists(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", *target.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    modules = set(re.findall(r"python -m ([\w.]+)", done.stdout)) - {"venv"}
    assert [name for name in modules if find_spec(name) is None] == []
