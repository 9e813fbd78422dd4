"""Doubtful variables and missing files are named; what Kubernetes sets for a Service is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim.config.loader import load
from shim.config.settings import Settings
from shim.config.warnings import find_warnings


@pytest.mark.parametrize(
    "name,meant",
    [
        ("SHIM_UPSTREAM_URL", "SHIM_UPSTREAM__URL"),
        ("SHIM__UPSTREAM__URL", "SHIM_UPSTREAM__URL"),
        ("SHIM_UPSTREEM__URL", "SHIM_UPSTREAM__URL"),
        ("SHIM_TOKEN_FILE", "SHIM_"),
        ("SHIM_CA_FILE", "SHIM_"),
        ("SHIM_UPSTREAM_RECONNECT_MAX_S", "SHIM_UPSTREAM__RECONNECT__MAX_S"),
        ("AGENT_SHIM_UPSTREAM__URL", "SHIM_UPSTREAM__URL"),
        ("shim_upstream__url", "SHIM_UPSTREAM__URL"),
        ("SHIM_MOD", "SHIM_MODE"),
        ("SHIM_LISTEN_PORT", "SHIM_LISTEN__PORT"),
    ],
)
def test_a_variable_that_is_nearly_ours_is_named_without_its_value(name: str, meant: str) -> None:
    (warning,) = find_warnings(Settings(), {name: "hunter2"})
    assert name in warning
    assert meant in warning
    assert "hunter2" not in warning


def test_keys_that_were_removed_with_the_stores_in_nats_are_named(tmp_path: Path) -> None:
    file, env = tmp_path / "shim.yaml", {"SHIM_STORE__CREDENTIALS_FILE": ""}
    file.write_text("store: {replicas: 3}\nshards: {count: 0}\n")
    assert load(str(file), env, ["shards.count=0"]) == Settings()
    assert find_warnings(Settings(), env, str(file)) == [
        f"{key} has no effect: stores in NATS are gone, remove it"
        for key in ("shards", "store.credentials_file", "store.replicas")
    ]


def test_an_unknown_section_is_named() -> None:
    assert find_warnings(Settings(), {"SHIM_QQQ__ZZZ": "x"}) == [
        "environment: SHIM_QQQ__ZZZ is not read: there is no such section"
    ]


@pytest.mark.parametrize(
    "name,value",
    [
        ("SHIM_SERVICE_HOST", "10.0.0.1"),
        ("SHIM_SERVICE_PORT", "7080"),
        ("SHIM_SERVICE_PORT_HTTP", "7080"),
        ("SHIM_PORT", "tcp://10.0.0.1:7080"),
        ("SHIM_PORT_7080_TCP", "tcp://10.0.0.1:7080"),
        ("SHIM_PORT_7080_TCP_PROTO", "tcp"),
        ("SHIM_PORT_7080_TCP_ADDR", "10.0.0.1"),
        ("SHIM_LISTEN_PORT", "tcp://10.0.0.1:7080"),
        ("SHIM_LISTEN_SERVICE_HOST", "10.0.0.1"),
        ("AGENT_SHIM_PORT", "tcp://10.0.0.1:7080"),
        ("AGENT_SHIM_SERVICE_HOST", "10.0.0.1"),
        ("SHIM_UPSTREAM__URL", "https://h"),
        ("SHIM_MODE", "http"),
        ("SHIMMER", "x"),
        ("SHIM_COLOUR_SCHEME", "x"),
        ("PATH", "/bin"),
    ],
)
def test_other_variables_are_harmless(name: str, value: str) -> None:
    assert find_warnings(Settings(), {name: value}) == []


def test_files_that_do_not_exist_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    keys = [
        "upstream.token_file",
        "admin.token_file",
        "upstream.ca_file",
        "listen.tls.cert_file",
        "listen.tls.key_file",
    ]
    sets = [f"{key}={missing}" for key in keys]
    settings = load(None, {}, [*sets, "store.url=postgresql://u@h/db", "fallback.url=https://h"])
    found = find_warnings(settings, {})
    assert {warning.partition(":")[0] for warning in found} == set(keys)
    assert all(f"No such file or directory ({missing})" in warning for warning in found)


def test_a_token_file_that_holds_no_token_is_named(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("hunter2 hunter2")
    (warning,) = find_warnings(load(None, {}, [f"upstream.token_file={file}"]), {})
    assert warning.startswith("upstream.token_file: the file must hold one word")
    assert "hunter2" not in warning


def test_very_many_are_not_all_named() -> None:
    found = find_warnings(Settings(), {f"SHIM_QQQ{number}__ZZZ": "x" for number in range(50)})
    assert (len(found), found[-1]) == (21, "and 30 more")
