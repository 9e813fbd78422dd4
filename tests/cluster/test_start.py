"""What a replica needs before it starts, and what a shim without a database pays for it: nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shim.cluster.replica import advertised
from tests.support.processes import Shim

ONE_BRIDGE = """
import sys
from shim import app
assert not [name for name in sys.modules if name.startswith(("psycopg", "cryptography", "shim.cluster"))]
"""


def test_nothing_of_a_cluster_is_imported_without_one() -> None:
    subprocess.run([sys.executable, "-c", ONE_BRIDGE], check=True, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("10.0.0.7", "10.0.0.7:7081"),
        ("10.0.0.7:9", "10.0.0.7:9"),
        ("pod-1.shim.ns.svc", "pod-1.shim.ns.svc:7081"),
        ("[fd00::7]", "[fd00::7]:7081"),
        ("[fd00::7]:9", "[fd00::7]:9"),
    ],
)
def test_the_advertised_address_has_the_port_that_is_listened_on(given: str, expected: str) -> None:
    assert advertised(given, 7081) == expected


@pytest.mark.parametrize(
    "cluster, said",
    [
        ({"host": "0.0.0.0"}, "cluster.advertise: must be set while cluster.host is every address"),
        ({"advertise": "http://a"}, "cluster.advertise: must be a host name or an address"),
        ({"port": 7080}, "cluster.port: must differ from listen.port"),
        ({"lease_s": 0.5}, "cluster.lease_s: must be from 1 to 600"),
    ],
)
async def test_what_makes_no_sense_is_told_by_its_key(tmp_path: Path, cluster: dict[str, object], said: str) -> None:
    config = {"listen": {"port": 7080}, "store": {"url": "postgresql://shim@127.0.0.1/shim"}, "cluster": cluster}
    async with Shim(tmp_path, config) as shim:
        await shim.launch()
        assert await shim.wait() == 2
        assert said in "\n".join(shim.lines)
