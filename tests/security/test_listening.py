"""Listeners take one address or several; `::` is every address of both families."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from shim.errors import StartError
from shim.listening import bind
from tests.security.raw_client import ask, request
from tests.support.processes import free_port, world


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    "host, reached",
    [
        pytest.param("::", ["127.0.0.1", "::1"], marks=needs_ipv6),
        pytest.param(["127.0.0.1", "::1"], ["127.0.0.1", "::1"], marks=needs_ipv6),
        (["127.0.0.1", "127.0.0.2"], ["127.0.0.1", "127.0.0.2"]),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
async def test_both_ports_answer_on_all_their_addresses(tmp_path: Path, host: Any, reached: list[str]) -> None:
    ports = {"listen": free_port(), "admin": free_port()}
    config = {section: {"host": host, "port": port} for section, port in ports.items()}
    async with world(tmp_path, config) as (shim, _):
        await shim.start()
        for address in reached:
            headers = ("Authorization: Bearer tok-of-the-cluster",)
            health = await ask(f"{address}:{ports['listen']}", request("GET", "/api/v1/health", *headers))
            healthz = await ask(f"{address}:{ports['admin']}", request("GET", "/healthz"))
            assert (health.status, healthz.status) == (200, 200), address


async def test_the_environment_gives_several_as_json(tmp_path: Path) -> None:
    async with world(tmp_path) as (shim, _):
        shim.environment["SHIM_ADMIN__HOST"] = '["127.0.0.1", "127.0.0.2"]'
        await shim.start()
        port = shim.admin.rpartition(":")[2]
        assert (await ask(f"127.0.0.2:{port}", request("GET", "/healthz"))).status == 200


def test_a_fault_names_the_address_among_several_and_leaves_none_taken() -> None:
    with pytest.raises(StartError, match=r"admin.host 192\.0\.2\.1 is not an address of this machine"):
        bind("admin", ("127.0.0.1", "192.0.2.1"), 0)
