"""The example with the NATS project's chart: its settings hold a store in shards, and both files fit together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shim import config
from tests.support.manifests import ROOT, container, env_of, one, rendered
from tests.support.natsd import NatsServer, running
from tests.support.processes import Shim
from tests.tools.doctor.conftest import Diagnosis, Doctor

EXAMPLES = ROOT / "helm" / "examples"
PASSWORD = "canary0123456789abcdef"
NOWHERE = {"url": "http://127.0.0.1:9", "token": "canary-token"}


def values(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return found


def server_file(merged: dict[str, Any]) -> str:
    """What that chart makes of `config.merge`: JSON, with texts between << and >> as they stand."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in merged.items()]
    return re.sub(r'"<< (.*?) >>"', r"\1", "\n".join(lines)) + "\n"


@pytest.mark.needs("nats-server")
async def test_the_account_of_the_example_holds_a_store_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SHIM_PASSWORD", PASSWORD)
    doctor = Doctor(tmp_path)
    server = NatsServer(tmp_path, server_file(values("nats.yaml")["config"]["merge"]))
    with running(server):
        store = {"url": server.url.replace("//", f"//agent-shim:{PASSWORD}@"), "replicas": 1}
        shards = {"count": 2, "replica": "a"}
        (tmp_path / "shim").mkdir()
        async with Shim(tmp_path / "shim", {"store": store, "shards": shards, "upstream": NOWHERE}) as shim:
            await shim.start()
            for number in range(2):
                await shim.event("shard_taken", shard=number)
            found = Diagnosis(*await doctor.run("--json", store=store, shards=shards, upstream=NOWHERE))
        for check in ("nats", "payload", "nats-user", "jetstream", "replicas", "streams", "shards"):
            found.expect(check, "PASS")
        stranger = {**store, "url": server.url}
        found = Diagnosis(*await doctor.run("--json", store=stranger, shards=shards, upstream=NOWHERE))
        found.expect("nats-user", "FAIL", "refuses the credentials")


@pytest.mark.needs("helm3", "helm4")
@pytest.mark.parametrize("helm", ["helm3", "helm4"])
def test_the_gateway_of_the_example_is_valid_and_fits_its_servers(helm: str, tmp_path: Path) -> None:
    objects = rendered("injection.admissionPolicy.enabled=false", helm=helm, values=EXAMPLES / "gateway.yaml")
    for each in objects:
        kubernetes_validate.validate(each, "1.36", strict=True)
    servers = values("nats.yaml")["config"]["cluster"]["replicas"]
    file = tmp_path / "config.yaml"
    file.write_text(one(objects, "ConfigMap")["data"]["config.yaml"])
    text = (EXAMPLES / "gateway.yaml").read_text()
    (pattern,) = re.findall(r'echo "(tls://\S+)"', text)
    url = ",".join(pattern.replace("$PASSWORD", "p").replace("$n", str(n)) for n in range(servers))
    settings = config.load(str(file), {"SHIM_STORE__URL": url}, [])
    assert settings.store.replicas == servers
    assert settings.shards.count >= one(objects, "Deployment")["spec"]["replicas"] == 3
    shim = container(one(objects, "Deployment")["spec"]["template"], "agent-shim")
    assert env_of(shim)["SHIM_STORE__URL"] == {"secretKeyRef": {"name": "agent-shim-nats", "key": "url"}}
    nats = next(rule for rule in one(objects, "NetworkPolicy")["spec"]["egress"] if rule["ports"][0]["port"] == 4222)
    assert nats["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "nats"}}}]
