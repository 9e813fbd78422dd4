"""What `agent-shim run` does for itself at its start, and what it says about a configuration that leaves doors open."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shim.config.settings import Settings
from shim.process import security_warnings
from tests.support.processes import Shim, world

ROOT = Path(__file__).parents[2]


async def test_a_running_shim_dumps_no_core(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        assert resource.prlimit(shim.pid, resource.RLIMIT_CORE) == (0, 0)
        assert not shim.events("memory_not_private")


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_process_that_keeps_its_memory_private_cannot_be_dumped_or_traced() -> None:
    script = (
        "import ctypes; from shim.process import disable_core_dumps; prctl = ctypes.CDLL(None).prctl\n"
        "get_dumpable = 3\n"
        "print(prctl(get_dumpable), disable_core_dumps(), prctl(get_dumpable))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True", "0"]


async def test_what_the_configuration_leaves_open_is_said_at_the_start(tmp_path: Path) -> None:
    config: dict[str, Any] = {"listen": {"host": "0.0.0.0", "port": 0}}
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        assert shim.events("listen_without_tls")[0]["level"] == "warning"


@pytest.mark.parametrize(
    "sections,events",
    [
        ({}, []),
        ({"listen": {"host": "0.0.0.0"}}, ["listen_without_tls"]),
        ({"listen": {"host": "0.0.0.0", "tls": {"cert_file": "c", "key_file": "k"}}}, []),
        ({"upstream": {"allow_insecure": True}}, ["upstream_allow_insecure"]),
    ],
)
def test_open_doors(sections: dict[str, Any], events: list[str]) -> None:
    assert [event for event, _ in security_warnings(msgspec.convert(sections, Settings))] == events


async def test_a_second_shim_on_one_store_ends_and_says_why(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        await shim.start()
        async with Shim(tmp_path, {"store": {"path": str(tmp_path / "agent-shim.db")}}) as second:
            await second.launch()
            assert await second.wait() == 70
            assert "another agent-shim uses the database" in second.events("stopped_by_fault")[0]["error"]
        await shim.kill()
        await shim.start()
