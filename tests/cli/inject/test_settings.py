"""`agent-shim inject --config, --set`: the operator's settings in the ConfigMap, checked before a cluster has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trustme

from shim.cli.inject.settings import read
from shim.cli.inject.sidecar import STORE_DIR, InjectError
from shim.config import loader
from shim.errors import ConfigError
from tests.cli.inject.test_documents import IMAGE, agent_shim
from tests.support.manifests import documents, one, vendor_text


def injected(*args: str) -> dict[str, Any]:
    """The files of the ConfigMap, by name; the configuration as data."""
    args = ("--image", IMAGE, *args)
    done = agent_shim(*args, stdin=vendor_text("installer"))
    assert (done.returncode, done.stderr) == (0, "")
    files: dict[str, Any] = one(documents(done.stdout), "ConfigMap")["data"]
    again = agent_shim(*args, stdin=done.stdout)
    assert again.stdout == done.stdout
    assert agent_shim("--remove", stdin=done.stdout).stdout == vendor_text("installer")
    return {**files, "config.yaml": documents(files["config.yaml"])[0]}


def test_settings_of_a_file_and_of_options_reach_the_config_map(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("mode: auto\nfallback: {url: https://old.example}\nrollout: {percent: 10}\nlisten: {port: 7080}\n")
    config = injected("--config", str(file), "--set", "rollout.percent=50", "--set", 'commands.types=["deploy"]')
    config = config["config.yaml"]
    assert config["mode"] == "auto"
    assert config["fallback"] == {"url": "https://old.example"}
    assert config["rollout"] == {"percent": 50}
    assert config["commands"] == {"types": ["deploy"]}
    assert config["listen"] == {"host": "127.0.0.1", "port": 7080}
    assert config["store"] == {"path": f"{STORE_DIR}/data/agent-shim.db"}


def test_the_running_shim_reads_the_result(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(str(injected("--set", "poll.hold=4", "--set", "upstream.ping_interval_s=7")["config.yaml"]))
    settings = loader.load(str(file), {}, [])
    assert (settings.poll.hold, settings.upstream.ping_interval_s) == (4.0, 7.0)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_an_authority_goes_into_the_config_map(tmp_path: Path, encoding: str, ends: str) -> None:
    pem = "# Főtanúsítvány\n" + trustme.CA().cert_pem.bytes().decode()
    (tmp_path / "ca.pem").write_bytes(pem.replace("\n", ends).encode(encoding))
    files = injected("--set", f"upstream.ca_file={tmp_path / 'ca.pem'}")
    assert files["upstream-ca.pem"] == pem
    assert files["config.yaml"]["upstream"]["ca_file"] == "/etc/agent-shim/upstream-ca.pem"


@pytest.mark.parametrize(
    "item, reason",
    [
        ("upstream.url=https://x.example", "upstream.url: the sidecar takes it from the agent's own PIPEOPS_API_URL"),
        ("upstream.token=hunter2", "no place for a secret"),
        ("upstream.proxy=http://me:hunter2@proxy:3128", "upstream.proxy: a secret is in it"),
        ("fallback.url=https://old.example/?key=hunter2", "fallback.url: a secret is in it"),
        ("notify.url=https://hooks.example/services/hunter2-hunter2", "notify.url: a secret is in it"),
        (
            "telemetry.otlp_url=https://t.example/v1/traces?api-key=hunter2",
            "telemetry.otlp_url: a secret is in it",
        ),
        ("upstream.client_cert_file=/x.pem", "client_key_file"),
        ("listen.port=7081", "listen.port: in the pod it is 7080"),
        ("admin.host=0.0.0.0", "admin.host: in the pod it is its own address"),
        ("store.path=/data/x.db", "store.path: in the pod it is"),
        ("store.url=postgresql://db/x", "a database is for the chart's gateway mode"),
        ("rollout.percent=lots", "rollout.percent"),
        ("rollout.percnt=10", "percnt"),
        ("mode", "--set needs"),
        ("upstream.ca_file=/none.pem", "upstream.ca_file: /none.pem cannot be read"),
    ],
)
def test_what_has_no_place_in_the_pod(item: str, reason: str) -> None:
    with pytest.raises((InjectError, ConfigError)) as refused:
        read(None, [item], own_token=False)
    told = str(refused.value)
    assert reason in told
    assert "hunter2" not in told


def test_a_bad_file_ends_the_command_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("mode: of\nlisten: {port: high}\n")
    done = agent_shim("--image", IMAGE, "--config", str(file), stdin=vendor_text("installer"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "mode" in done.stderr
    assert "listen.port" in done.stderr


def test_neither_a_pipe_nor_binary_data_is_an_authority(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "der").write_bytes(b"\x30\x82\xff")
    for name in ("pipe", "der"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(None, [f"upstream.ca_file={tmp_path / name}"], own_token=False)


@pytest.mark.parametrize("other", ["--no-config", "--remove", "--check"])
def test_settings_without_a_config_map_to_write_are_a_usage_error(other: str) -> None:
    done = agent_shim("--set", "mode=http", other, stdin=vendor_text("installer"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--set" in done.stderr
