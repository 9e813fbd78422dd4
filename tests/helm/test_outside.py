"""What runs and rolls out the shim besides the chart: GitOps values, compose, systemd; no drift in generated files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shim import __version__
from shim.config import loader
from tests.support.manifests import ROOT, one, rendered, run

GITOPS = ROOT / "config" / "gitops"
SYSTEMD = ROOT / "config" / "systemd"
COMPOSE = ROOT / "config" / "compose" / "compose.yaml"


def test_generated_files_are_what_their_sources_say() -> None:
    command = [sys.executable, ROOT / "helm" / "generate.py", "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr


class TestGitOps:
    pytestmark = pytest.mark.needs("helm4")

    def settings(self, tmp_path: Path, *sets: str, files: tuple[str, ...] = ("rollout.yaml",)) -> loader.Settings:
        more = [part for name in files for part in ("--values", str(GITOPS / "values" / name))]
        more += [part for pair in sets for part in ("--set", pair)]
        text = run(
            "helm4", "template", "agent-shim", ROOT / "helm" / "agent-shim", "--namespace", "pipeops-system", *more
        )
        found = [each for each in yaml.safe_load_all(text) if each and each["kind"] == "ConfigMap"]
        file = tmp_path / "config.yaml"
        file.write_text(found[0]["data"]["config.yaml"])
        return loader.load(str(file), {}, [])

    @pytest.mark.parametrize("percent", [10, 50, 100])
    def test_one_number_moves_the_fleet(self, percent: int, tmp_path: Path) -> None:
        settings = self.settings(tmp_path, f"config.rollout.percent={percent}")
        assert (settings.mode, settings.rollout.percent) == ("websocket", percent)

    def test_one_value_is_the_rollback(self, tmp_path: Path) -> None:
        assert self.settings(tmp_path, "config.mode=http").mode == "http"

    def test_a_cluster_has_the_last_word(self, tmp_path: Path) -> None:
        settings = self.settings(tmp_path, files=("rollout.yaml", "clusters/staging.yaml"))
        assert settings.rollout.percent == 100

    def test_the_application_set_names_files_that_are_there(self) -> None:
        source = yaml.safe_load((GITOPS / "applicationset.yaml").read_text())["spec"]["template"]["spec"]["source"]
        chart = ROOT / source["path"]
        shared, own = source["helm"]["valueFiles"]
        assert (chart / shared).resolve() == GITOPS / "values" / "rollout.yaml"
        assert (chart / own.replace("{{.name}}", "staging")).resolve().exists()


class TestSystemd:
    def test_the_agents_variable_is_the_shims_address(self) -> None:
        assert (SYSTEMD / "agent.env").read_text() == "PIPEOPS_API_URL=http://127.0.0.1:7080\n"

    @pytest.mark.needs("systemd-analyze")
    def test_the_unit_is_hardened(self) -> None:
        unit = SYSTEMD / "agent-shim.service"
        # Exit code 1 above a score of 1.5 in systemd's own figure of exposure (0 to 10).
        shown = run("systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", unit)
        assert "Overall exposure level for agent-shim.service: 1." in shown

    @pytest.mark.needs("systemd-analyze")
    def test_systemd_understands_every_line(self, tmp_path: Path) -> None:
        text = (SYSTEMD / "agent-shim.service").read_text()
        program = tmp_path / "agent-shim"
        program.write_text("#!/bin/true\n")
        program.chmod(0o755)
        unit = tmp_path / "agent-shim.service"
        unit.write_text(text.replace("/opt/agent-shim/bin/agent-shim", str(program)))
        done = subprocess.run(
            ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=120, check=False
        )
        assert [line for line in done.stderr.splitlines() if "agent-shim.service" in line] == []


class TestCompose:
    def services(self) -> dict[str, dict]:
        found: dict[str, dict] = yaml.safe_load(COMPOSE.read_text())["services"]
        return found

    def test_the_agent_waits_for_the_shim_and_shares_its_loopback(self) -> None:
        agent = self.services()["agent"]
        assert agent["network_mode"] == "service:agent-shim"
        assert agent["depends_on"] == {"agent-shim": {"condition": "service_healthy"}}
        assert agent["environment"]["PIPEOPS_API_URL"] == "http://127.0.0.1:7080"

    def test_the_shim_is_hardened_and_its_variables_are_its_own(self) -> None:
        shim = self.services()["agent-shim"]
        assert (shim["read_only"], shim["cap_drop"], shim["user"]) == (True, ["ALL"], "10001:10001")
        assert __version__ in shim["image"]
        env = {key: value.partition(":-")[2].rstrip("}") or value for key, value in shim["environment"].items()}
        settings = loader.load(None, env, [])
        assert settings.upstream.token_file == "/run/agent-shim/token"
        assert settings.upstream.url == "https://api.pipeops.io"


@pytest.mark.needs("helm4")
def test_the_defaults_of_the_chart_install_nothing_outside_the_namespace_without_the_policy() -> None:
    objects = rendered("injection.admissionPolicy.enabled=false")
    assert {each["kind"] for each in objects} == {"ConfigMap", "Pod"}
    assert one(objects, "ConfigMap")["metadata"]["namespace"] == "pipeops-system"
