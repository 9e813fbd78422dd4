"""The command line as users and scripts see it: output, exit codes, and what is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from shim import __version__
from shim.cli import commands, main
from shim.errors import StoreVersionError

SHOW_MODULES = """
import sys
from shim.cli import main
try:
    main.main(["--help"])
finally:
    print(sorted(sys.modules), file=sys.stderr)
"""


def agent_shim(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real process."""
    return subprocess.run(
        [sys.executable, "-m", "shim", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )


def exit_code(*args: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main.main(args)
    return caught.value.code


def test_version() -> None:
    done = agent_shim("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"agent-shim {__version__}\n", "")


def test_help_lists_every_command_without_importing_it() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW_MODULES], capture_output=True, text=True, timeout=120, check=True)
    for name in ("run", "check-config", "controller", "demo", "fleet"):
        assert f"\n  {name} " in done.stdout
    for heavy in ("aiohttp", "yaml", "msgspec", "rich", "asyncio", "shim.cli.doctor"):
        assert f"'{heavy}'" not in done.stderr


def test_check_config_prints_the_effective_configuration(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("upstream: {token: hunter2}\nlisten: {port: 1}\n")
    done = agent_shim("check-config", "--config", str(file), "--set", "listen.port=2", env={"SHIM_ADMIN__PORT": "3"})
    assert (done.returncode, done.stderr) == (0, "")
    shown = yaml.safe_load(done.stdout)
    assert (shown["listen"]["port"], shown["admin"]["port"], shown["upstream"]["token"]) == (2, 3, "***")


def test_check_config_tells_all_faults_and_exits_2(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("upstream: {tokn: hunter2}\nlisten: {port: -1}\n")
    done = agent_shim("check-config", "--config", str(file))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "2 faults in the configuration:",
        "  upstream.tokn: unknown key, did you mean upstream.token?",
        "  listen.port: must be from 0 to 65535",
    ]


def test_run_tells_all_faults_and_exits_2(tmp_path: Path) -> None:
    done = agent_shim("run", "--config", str(tmp_path / "none.yaml"), "--set", "admin.port=-1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "2 faults in the configuration:",
        f"  {tmp_path}/none.yaml cannot be read: No such file or directory",
        "  admin.port: must be from 0 to 65535",
    ]


def test_one_fault_is_not_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("check-config", "--set", "mode=x") == 2
    assert capsys.readouterr().err.startswith("1 fault in")


@pytest.mark.parametrize("args", [("nonsense",), ("check-config", "--nonsense"), ("run", "stray")])
def test_a_wrong_command_line_exits_2(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*args) == 2
    assert "Error: " in capsys.readouterr().err


def test_a_full_disk_behind_the_output_is_said_in_one_line() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123 - a device
        command = [sys.executable, "-m", "shim", "check-config"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: the output cannot be written: No space left on device\n")


def _raising(exc: Exception) -> click.Command:
    def fail() -> None:
        raise exc

    return click.Command("fail", callback=fail)


@pytest.mark.parametrize(
    "exc,code,told",
    [
        (StoreVersionError("schema 9 needs a newer version"), 78, "store: schema 9 needs a newer version\n"),
        (ValueError("at ws://h?token=hunter2"), 70, "ValueError: at ws://h?token=***\n"),
        (click.ClickException("did not work"), 1, "Error: did not work\n"),
    ],
)
def test_exit_codes_of_failures(exc: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands.cli.add_command(_raising(exc))
    try:
        assert exit_code("fail") == code
    finally:
        del commands.cli.commands["fail"]
    shown = capsys.readouterr().err
    assert shown.endswith(told)
    assert "hunter2" not in shown.splitlines()[-1]


def lazy(tmp_path: Path, source: str) -> commands.LazyGroup:
    """A group with the command `extra`, whose module has this source."""
    name = f"lazy_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(source)
    return commands.LazyGroup(modules={"extra": (f"{name}:command", "An extra.")})


def invoke(group: commands.LazyGroup, tmp_path: Path) -> tuple[int, str, BaseException | None]:
    sys.path.insert(0, str(tmp_path))
    try:
        result = CliRunner().invoke(group, ["extra"])
    finally:
        sys.path.remove(str(tmp_path))
    return result.exit_code, result.output, result.exception


def test_a_lazy_command_is_imported_when_called(tmp_path: Path) -> None:
    group = lazy(tmp_path, "import click\ncommand = click.Command('extra', callback=lambda: click.echo('done'))\n")
    assert "An extra." in CliRunner().invoke(group, ["--help"]).output
    assert group.list_commands(click.Context(group)) == ["extra"]
    assert invoke(group, tmp_path)[:2] == (0, "done\n")


@pytest.mark.parametrize(
    "missing,extra", [("rich", "tools"), ("ruamel.yaml", "tools"), ("psycopg", "postgres"), ("devtools", "devtools")]
)
def test_a_command_without_its_extra_says_what_to_install(
    missing: str, extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.cli.add_command(_raising(ModuleNotFoundError("gone", name=missing)))
    try:
        assert exit_code("fail") == 2
    finally:
        del commands.cli.commands["fail"]
    package = missing.partition(".")[0]
    assert capsys.readouterr().err == f"Error: this needs {package}: pip install 'agent-shim[{extra}]'\n"


def test_any_other_missing_module_is_a_defect(tmp_path: Path) -> None:
    _, _, exception = invoke(lazy(tmp_path, "raise ModuleNotFoundError('gone', name='shim.gone')\n"), tmp_path)
    assert isinstance(exception, ModuleNotFoundError)


def test_only_a_database_has_shards(tmp_path: Path) -> None:
    """The place of a file must not lead to the database that the environment names."""
    done = agent_shim(
        "store", "shards", "4", "--at", str(tmp_path / "shim.db"), env={"PGHOST": "127.0.0.1", "PGPORT": "1"}
    )
    assert done.returncode == 2
    assert "--at: expected postgresql://" in done.stderr
