"""The entry point imports no more than its command needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_run_imports_neither_click_nor_the_web_framework(tmp_path: Path) -> None:
    """Each would take 1 MB of an idle sidecar's memory."""
    code = (
        "import sys; from shim import launch; from shim.cli import main\n"
        "launch.main = lambda *given: (launch.import_app(), sys.exit(str(sorted(sys.modules))))\n"
        f"main.main(['run', '--config', '{tmp_path}/none.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "'shim.app'" in done.stderr
    kept = [name for name in ("click", "aiohttp.web", "aiohttp.web_ws", "argparse") if f"'{name}'" in done.stderr]
    assert not kept, kept


def test_a_fault_keeps_its_exit_code_where_nothing_can_be_printed() -> None:
    for redirection in ("2>&-", "2>/dev/full"):
        shell = f'exec "$0" -m shim run --set foo=bar {redirection}'
        assert subprocess.run(["sh", "-c", shell, sys.executable], timeout=120, check=False).returncode == 2


def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_1() -> None:
    """What `check-config` prints is longer than the buffer, which Python writes at its end."""
    shell = 'exec "$0" -m shim check-config >/dev/full'
    done = subprocess.run(["sh", "-c", shell, sys.executable], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: the output cannot be written: No space left on device\n")


def test_a_closed_output_is_no_defect(tmp_path: Path) -> None:
    (tmp_path / "pod.yaml").write_text("kind: Pod\nspec:\n  containers: [{name: pipeops-agent}]\n")
    shell = f'exec "$0" -m shim inject -f {tmp_path}/pod.yaml --image registry.example/a:1 --own-token >&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("doctor --set upstream.url=http://127.0.0.1:1", 1, "Error: the working directory was removed"),
        (
            "run --set upstream.url=http://127.0.0.1:1 --set listen.port=0 --set admin.port=0",
            70,
            "store.path agent-shim.db",
        ),
    ],
)
def test_a_working_directory_that_was_removed_is_named(command: str, code: int, said: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = f'cd {gone} && rmdir {gone} && exec "$0" -m shim {command}'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("inject --check <&-", 1, "Error: - cannot be read: it is closed"),
        ("rollout preview --from-file - <&-", 64, "Error: standard input cannot be read: it is closed"),
        ("rollout report --urls - --expect - <&-", 64, "Error: standard input cannot be read: it is closed"),
    ],
)
def test_a_closed_standard_input_is_no_defect(command: str, code: int, said: str) -> None:
    shell = f'exec "$0" -m shim {command}'
    done = subprocess.run(["sh", "-c", shell, sys.executable], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.strip()) == (code, said)
