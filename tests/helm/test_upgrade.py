"""A release of the version before is upgraded with its own values: they render with today's chart as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shim.config import loader
from tests.support.manifests import CHART, HELMS, REGISTRY, Refused, documents, one, run, template

BEFORE = Path(__file__).parents[1] / "fixtures" / "version-before" / "values"
VALUES = sorted(path.name for path in BEFORE.glob("*.yaml"))
REGISTRY_SET = f"image.registry={REGISTRY}"

pytestmark = pytest.mark.needs("helm3", "helm4")


def settings_of(objects: list[dict[str, Any]], folder: Path) -> Any:
    """Load the configuration of the chart's ConfigMap as the shim does."""
    file = folder / "config.yaml"
    file.write_text(one(objects, "ConfigMap", "agent-shim")["data"]["config.yaml"])
    return loader.load(str(file), {"SHIM_UPSTREAM__URL": "https://controller.example"}, [])


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("helm", HELMS)
def test_values_of_the_version_before_render_and_configure_the_shim(helm: str, values: str, tmp_path: Path) -> None:
    objects = documents(template(REGISTRY_SET, helm=helm, values=BEFORE / values))
    chosen = yaml.safe_load((BEFORE / values).read_text())
    settings = settings_of(objects, tmp_path)
    given = chosen.get("config") or {}
    assert settings.mode == given.get("mode", "websocket")
    assert settings.rollout.percent == given.get("rollout", {}).get("percent", 100)
    assert ("Deployment" in {each["kind"] for each in objects}) == (chosen.get("mode") == "gateway")


@pytest.mark.parametrize("value", ["store.url=nats://nats:4222", "store.nats.urlSecretName=nats"])
def test_a_store_in_nats_is_refused_with_the_way_out(value: str) -> None:
    with pytest.raises(Refused, match="stores in NATS are gone"):
        template(REGISTRY_SET, value, "mode=gateway", values=BEFORE / "all.yaml")


@pytest.mark.parametrize("helm", HELMS)
def test_lint_accepts_all_values_of_the_version_before(helm: str) -> None:
    said = run(helm, "lint", "--strict", CHART, "--values", BEFORE / "all.yaml", "--set", REGISTRY_SET)
    assert "0 chart(s) failed" in said
