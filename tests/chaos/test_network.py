"""The network faults of the harness are what they say, in namespaces of their own."""

from __future__ import annotations

import pytest

from tests.support import network

pytestmark = pytest.mark.needs(*network.TOOLS)


def test_each_fault_is_seen_by_an_open_connection_and_heals() -> None:
    found = network.found_by("tests.chaos.harness.network_probe", 120)
    assert found["names"] == [network.FAR_ADDRESS, "gaierror", network.FAR_ADDRESS]
    assert found["cut"] == found["loss"] == "TimeoutError"  # nobody was told
    assert found["reset"] == "ConnectionResetError"
    assert found["latency"] >= 0.1
    assert found["narrow"] > 1  # 32 kB each way at 128 kbit/s
    assert found["healed"] < found["narrow"]  # as many bytes
