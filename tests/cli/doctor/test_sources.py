"""doctor says what it has read its configuration from, and examines that of a running shim if it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shim.cli.doctor.sources import Sources, compare, of_process, of_running
from shim.config import loader
from shim.config.settings import Settings
from shim.errors import ConfigError
from tests.cli.doctor.conftest import Diagnosis, Doctor
from tests.support.processes import Shim, world

TOKEN = "canary-token-in-the-environment"


async def diagnose(*options: str, environment: dict[str, str] | None = None) -> Diagnosis:
    """Run the real process: --pid changes its working directory."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shim", "doctor", "--json", *options),
        env=os.environ | (environment or {}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert err == b""
    assert process.returncode is not None
    return Diagnosis(process.returncode, out.decode())


async def test_the_sources_are_named_without_their_values(doctor: Doctor) -> None:
    doctor.environment = {"SHIM_UPSTREAM__TOKEN": TOKEN, "SHIM_UPSTREAM_URL": "https://canary"}
    sets = ("--set", "upstream.url=http://127.0.0.1:1")
    code, text = await doctor.run("--json", *sets)
    assert code == 1
    findings = json.loads(text)["findings"]
    assert findings[0]["text"] == (
        f"{doctor.path}, environment: SHIM_UPSTREAM__TOKEN, command line: upstream.url: mode websocket"
    )
    assert "SHIM_UPSTREAM_URL is not read, did you mean SHIM_UPSTREAM__URL?" in findings[1]["text"]
    assert "canary" not in text


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """A shim whose URL and token are in its environment only, and whose store is a relative path."""

    def make() -> Any:
        return world(tmp_path, {"store": {"path": str(tmp_path / "kept.db")}}, "--token", TOKEN)

    return make


def hide(shim: Shim) -> None:
    """Move the upstream from the file to the environment, as a systemd unit has it."""
    upstream = shim.config["upstream"]
    shim.environment |= {"SHIM_UPSTREAM__URL": upstream["url"], "SHIM_UPSTREAM__TOKEN": TOKEN}
    shim.write({"upstream": {}})


async def test_the_environment_of_a_process_is_examined(served: Any) -> None:
    async with served() as (shim, _):
        hide(shim)
        await shim.start()
        await shim.event("link_state", state="online")
        found = await diagnose("--pid", str(shim.pid), "--dial")
        assert f"process {shim.pid}: " in found.findings["config"]["text"]
        assert "environment: SHIM_UPSTREAM__TOKEN, SHIM_UPSTREAM__URL" in found.findings["config"]["text"]
        found.expect("token", "PASS")
        found.expect("upgrade", "PASS")
        assert "sources" not in found.findings


async def test_the_configuration_of_the_admin_port_is_examined(served: Any) -> None:
    async with served() as (shim, _):
        hide(shim)
        await shim.start()
        await shim.event("link_state", state="online")
        found = await diagnose("--url", shim.admin)
        assert "the running shim on" in found.findings["config"]["text"]
        found.expect("dns", "PASS")
        found.expect("token", "WARN", "--token-file")
        assert "kept.db" in found.findings["store"]["text"]
        assert found.failing == []


async def test_another_configuration_than_the_running_one_is_named(served: Any, doctor: Doctor) -> None:
    async with served() as (shim, _):
        hide(shim)
        await shim.start()
        found = await doctor.examine("--url", shim.admin)
        found.expect("sources", "WARN", "upstream.url", "upstream.token", "store.path", "--pid")
        assert "listen.port" not in found.findings["sources"]["text"]


async def test_nothing_at_the_admin_port_is_said() -> None:
    found = await diagnose("--url", "http://127.0.0.1:1")
    found.expect("shim", "FAIL", "no shim answers on the admin port 127.0.0.1:1 (Connection refused)", "--url")
    assert "config" not in found.findings


@pytest.mark.parametrize(
    "pid,told",
    [(2**22 + 7, "there is no process"), (os.getpid(), "is no `agent-shim run`")],
    ids=["of nobody", "of the tests"],
)
def test_processes_that_are_no_shim(pid: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        of_process(pid)


def test_a_process_is_read_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # given back afterwards: `of_process` changes it
    home = tmp_path / "7"
    home.mkdir()
    words = ["/usr/bin/python", "/usr/bin/agent-shim", "run", "--set", "a.b=1", "--config=x", "--set=c.d=--e"]
    (home / "cmdline").write_bytes("\0".join([*words, ""]).encode())
    (home / "environ").write_bytes(b"A=b=c\0\xff=\xff\0odd\0")
    (home / "cwd").symlink_to(tmp_path)
    (home / "root").symlink_to("/")
    found = of_process(7, tmp_path)
    assert (found.path, found.sets) == ("x", ("a.b=1", "c.d=--e"))
    assert found.environ["A"] == "b=c"
    (home / "root").unlink()
    (home / "root").symlink_to(tmp_path)
    assert of_process(7, tmp_path).path == str(home / "root" / (tmp_path / "x").relative_to("/"))


def test_masked_settings_are_read_back() -> None:
    sets = [
        "upstream.url=https://h/x?key=abcd",
        "upstream.token=abcd",
        "upstream.proxy=http://u:abcd@p:1",
        "poll.hold=5",
    ]
    found = of_running(json.loads(json.dumps(loader.redacted(loader.load(None, {}, sets)))))
    assert (found.upstream.url, found.upstream.token, found.upstream.proxy) == ("https://h/x", "", "http://p:1")
    assert found.poll.hold == 5
    database = "store.url=postgresql://shim:abcd@h:5432/db?sslmode=verify-full"
    found = of_running(json.loads(json.dumps(loader.redacted(loader.load(None, {}, [database])))))
    assert found.store.url == "postgresql://shim@h:5432/db"
    assert compare(Settings(), json.loads(json.dumps(loader.redacted(Settings())))) == []


def test_sources_of_nothing() -> None:
    assert Sources(None, (), {}).describe() == "no file, nothing in the environment, nothing on the command line"
