"""A short soak: every call is answered, nothing is lost, and its figures can be shown and drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.chaos.harness.pages import drawn, soak_table
from tests.support.processes import UNMEASURED

CALLS = 4000


@pytest.mark.timeout(300)
def test_every_command_of_a_soak_reaches_its_agent_and_its_result_the_controller(tmp_path: Path) -> None:
    figures = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.chaos.harness.soak", "--calls", str(CALLS), "--json", str(figures)]
    environment = os.environ | UNMEASURED
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    commands = found["commands"]
    assert sum(found["calls"].values()) >= CALLS
    assert all(found["calls"].values())
    assert commands["acked"] == commands["received"] == commands["results_taken"] > 0
    assert (commands["lost"], commands["results_lost"], commands["received_more_than_once"]) == (0, 0, 0)
    assert found["log"]["unexplained"] == []
    assert all(sample["pss_mib"] > 10 and sample["files"] > 48 for sample in found["samples"])
    assert any(f"{commands['acked']:,}" in line for line in soak_table(found))
    drawing = ET.fromstring(drawn(found))  # noqa: S314 - our own
    lines = drawing.iter("{http://www.w3.org/2000/svg}polyline")
    assert all(len(line.attrib["points"].split()) == len(found["samples"]) for line in lines)
