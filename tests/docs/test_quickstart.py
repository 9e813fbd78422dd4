"""The commands of the Kubernetes quickstart, as far as no cluster is needed: none is left out unnoticed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shim.cli.inject.sidecar import NAME
from tests.support.manifests import CHART, NAMESPACE, ROOT, container, documents, one, pod_of, run, vendor_text

PAGE = (ROOT / "docs" / "get-started" / "kubernetes.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
COMMANDS = [
    line.strip()
    for block in BLOCKS
    if not block.startswith("OK:")  # what a command prints
    for line in block.splitlines()
    if re.match(r"[a-z]", line)
]

NEEDS_A_CLUSTER = ("kubectl ", "until kubectl", "helm test")
# `docker build` is run by tests/image, with the same Dockerfile; a push needs a registry.
ELSEWHERE = ("docker build", "docker push")


def test_every_command_is_run_here_or_cannot_be() -> None:
    known = (*NEEDS_A_CLUSTER, *ELSEWHERE, "helm install", "alias shim=", "shim inject")
    assert COMMANDS
    assert [command for command in COMMANDS if not command.startswith(known)] == []


@pytest.mark.needs("helm4")
@pytest.mark.parametrize("more", ["", *re.findall(r"`(--set [a-zA-Z.]+=[\w-]+)`", PAGE)])
def test_the_chart_takes_the_values_of_the_page(more: str) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("helm install")]
    words = shlex.split(command.replace("REGISTRY", "registry.example"))
    assert words[:4] == ["helm", "install", "agent-shim", str(CHART.relative_to(ROOT))]
    named = more.replace("NAME", "prod-eu")
    objects = documents(
        run("helm4", "template", NAME, CHART, *words[4:], *shlex.split(named), "--kube-version", "1.36")
    )
    assert one(objects, "ConfigMap", NAME)["metadata"]["namespace"] == NAMESPACE


def test_the_other_way_of_step_3_makes_the_agents_manifest(tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if "shim inject" in block]
    lines = [line for line in block.splitlines() if line.startswith("shim inject")]
    (tmp_path / "agent.yaml").write_text(vendor_text("manifest"))
    script = "\n".join([f'shim() {{ "{sys.executable}" -m shim "$@"; }}', *lines])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    changed = [line for line in done.stdout.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert changed == [], "the page promises added lines only"
    pod = pod_of((tmp_path / "agent-with-shim.yaml").read_text())
    assert container(pod, NAME)["image"] == "REGISTRY/agent-shim:0.1.0"


def test_the_dry_run_is_the_one_that_a_test_runs() -> None:
    (command,) = [block for block in BLOCKS if block.startswith("until kubectl")]
    (path,) = re.findall(r"--output (jsonpath='\{\"\{\"\}.*?')", command)
    assert path in (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()  # tests/helm tries that one
