"""Rules beyond types, each with a case on either side."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest

from helm.generate import PATTERNS
from shim.config.loader import leaves, load
from shim.config.rules import BOUNDS, cross_field_faults, parse_date_s
from shim.config.settings import Settings
from shim.errors import ConfigError


def faulty(*sets: str) -> list[str]:
    """Paths of the faults that these settings have."""
    try:
        load(None, {}, sets)
    except ConfigError as exc:
        return [fault.path for fault in exc.faults]
    return []


def test_every_number_has_bounds_that_hold_its_default() -> None:
    numbers = {path: default for path, kind, default in leaves() if {int, float} & {kind, *get_args(kind)}}
    assert set(BOUNDS) == set(numbers)
    assert cross_field_faults(Settings(), frozenset()) == []


@pytest.mark.parametrize("path", sorted(BOUNDS))
def test_numbers_outside_their_bounds_are_faults(path: str) -> None:
    low, high = BOUNDS[path]
    assert faulty(f"{path}={int(high) + 1}") == [path]
    assert faulty(f"{path}=-1") == [path]
    if low >= 1:
        assert faulty(f"{path}=0") == [path]


@pytest.mark.parametrize(
    "sets",
    [
        ["listen.host=0.0.0.0"],
        ["listen.host=0.0.0.0", "listen.auth=required"],
        ["listen.host=127.0.0.9", "listen.auth=off"],
        ["listen.host=::1", "listen.auth=off"],
        ["listen.port=0", "admin.port=0"],
        ["listen.port=7090", "admin.host=10.0.0.1"],
        ["listen.base_path=/a/b"],
        ["listen.tls.cert_file=c", "listen.tls.key_file=k"],
        ["upstream.url=ws://localhost:1/base?x=y"],
        ["upstream.url=http://[::1]:80"],
        ["upstream.url=http://example.com", "upstream.allow_insecure=true"],
        ["upstream.proxy=http://u:p@proxy:3128"],
        ["poll.hold=0"],
        ["poll.hold=25", "poll.max_hold_s=25"],
        ["upstream.url=wss://h.example/api/v1/clusters/agent/ws"],
        ["upstream.url=https://bücher.example"],
        ["upstream.url=https://h.example."],
        ["mode=http"],
        ["mode=auto"],
        ["store.url=postgresql://u@db-0.example.com:5432,db-1.example.com/shim"],
        ["store.url=postgres://u:p@db.example.com/shim?sslmode=verify-full", "store.ca_file=/ca.pem"],
        ["store.url=postgresql://127.0.0.1:1/shim?sslmode=disable"],
        ["store.url=postgresql://[::1]/shim?sslmode=disable"],
        ["store.url=postgresql:///shim?host=/run/postgresql"],
        ["store.url=postgresql://db.example.com/shim?sslmode=require", "store.allow_insecure=true"],
        ["store.client_cert_file=c", "store.client_key_file=k"],
        ["mode=http", "fallback.url=https://api.example.com"],
        ["fallback.insecure_skip_verify=false", "fallback.proxy=http://u:p@[::1]:3128"],
        ["mode=auto", "fallback.url=http://127.0.0.1:9"],
        ["rollout.percent=12.5", "fallback.url=https://api.example.com"],
        ["fallback.use_upstream_token=true", "upstream.token_file=/t"],
        ["sunset.deprecation_at=2026-01-01", "sunset.at=2026-01-01T00:00:00Z", "sunset.link=https://example.com/a"],
    ],
)
def test_what_makes_sense_is_no_fault(sets: list[str]) -> None:
    assert faulty(*sets) == []
    for path, _, value in (each.partition("=") for each in sets):
        texts = json.loads(value) if value.startswith("[") else [value]
        assert all(re.search(PATTERNS.get(path, ""), text) for text in texts), path


@pytest.mark.parametrize(
    "sets,path",
    [
        (["listen.host="], "listen.host"),
        (["listen.host=a b"], "listen.host"),
        (["admin.host="], "admin.host"),
        (["listen.host=192.168.0.1", "listen.auth=off"], "listen.auth"),
        (["listen.host=shim.local", "listen.auth=off"], "listen.auth"),
        (["listen.port=7090"], "admin.port"),
        (["listen.base_path=a"], "listen.base_path"),
        (["listen.base_path=/a?b"], "listen.base_path"),
        (['listen.allowed_hosts=["http://a"]'], "listen.allowed_hosts"),
        (["listen.tls.cert_file=c"], "listen.tls.key_file"),
        (["listen.tls.key_file=k"], "listen.tls.cert_file"),
        (["upstream.client_cert_file=c"], "upstream.client_key_file"),
        (["upstream.client_key_file=c"], "upstream.client_cert_file"),
        (["upstream.url="], "upstream.url"),
        (["upstream.url=api.example.com"], "upstream.url"),
        (["upstream.url=ftp://example.com"], "upstream.url"),
        (["upstream.url=https://"], "upstream.url"),
        (["upstream.url=https://example.com:99999"], "upstream.url"),
        (["upstream.url=https://exa mple.com"], "upstream.url"),
        (["upstream.url=https://user@example.com"], "upstream.url"),
        (["upstream.url=https://example.com/#x"], "upstream.url"),
        (["upstream.url=ws://example.com"], "upstream.url"),
        (["upstream.url=http://127.0.0.1.example.com"], "upstream.url"),
        (["upstream.url=ws://controller.localhost"], "upstream.url"),
        (["upstream.url=ws://localhost."], "upstream.url"),
        (["fallback.url=http://controller.localhost"], "fallback.url"),
        (["listen.host=shim.localhost", "listen.auth=off"], "listen.auth"),
        (["upstream.url=http://127.0.0.1:7080"], "upstream.url"),
        (["upstream.url=ws://[::1]:7080/base"], "upstream.url"),
        (["upstream.url=https://localhost", "listen.port=443"], "upstream.url"),
        (["fallback.url=http://localhost:7080"], "fallback.url"),
        (["upstream.path=api"], "upstream.path"),
        (["upstream.path=/api?token=x"], "upstream.path"),
        (["upstream.token=a", "upstream.token_file=b"], "upstream.token_file"),
        (["upstream.token=a b"], "upstream.token"),
        (["upstream.token=ä"], "upstream.token"),
        (["upstream.proxy=proxy:3128"], "upstream.proxy"),
        (["upstream.proxy=socks5://proxy:1080"], "upstream.proxy"),
        (['upstream.gateway_hosts=["*.example.com"]'], "upstream.gateway_hosts"),
        (["upstream.read_timeout_s=25"], "upstream.read_timeout_s"),
        (["upstream.reconnect.max_s=0.5"], "upstream.reconnect.max_s"),
        (["upstream.reconnect.initial_s=4", "upstream.reconnect.refused_max_s=3"], "upstream.reconnect.refused_max_s"),
        (["poll.hold=21"], "poll.hold"),
        (["poll.max_hold_s=25.5"], "poll.max_hold_s"),
        (["sunset.at=soon"], "sunset.at"),
        (["sunset.at=2026-02-30"], "sunset.at"),
        (["sunset.at=20260101"], "sunset.at"),
        (["sunset.at=2026-01-01T00:00:00"], "sunset.at"),
        (["sunset.deprecation_at=2026-01-01T25:00:00Z"], "sunset.deprecation_at"),
        (["sunset.at=2026-01-01", "sunset.deprecation_at=2026-01-02"], "sunset.at"),
        (["sunset.link=example.com"], "sunset.link"),
        (["notify.url=hooks.example/alerts"], "notify.url"),
        (["notify.url=ftp://hooks.example/alerts"], "notify.url"),
        (["notify.url=https://hooks.example/a", "notify.url_file=/x"], "notify.url_file"),
        (["telemetry.otlp_url=collector:4318"], "telemetry.otlp_url"),
        (["telemetry.otlp_url=http://me:hunter2@collector:4318/v1/traces"], "telemetry.otlp_url"),
        (["notify.proxy=socks5://proxy:1080"], "notify.proxy"),
        (["sunset.link=https://example.com/>"], "sunset.link"),
        (["commands.types=[]"], "commands.types"),
        (['commands.types=[""]'], "commands.types"),
        (['commands.at_most_once=[""]'], "commands.at_most_once"),
        (["store.path="], "store.path"),
        (["store.url=mysql://a/b"], "store.url"),
        (["store.url=postgresql://u@h"], "store.url"),
        (["store.url=postgresql://u@h/"], "store.url"),
        (["store.url=postgresql://u@127.0.0.1:5432x/b"], "store.url"),
        (["store.url=postgresql://u@127.0.0.1:5432,127.0.0.1:99999/b"], "store.url"),
        (["store.url=postgresql://u@h/b a"], "store.url"),
        (["store.url=postgresql://u@[h/b"], "store.url"),
        (["store.url=postgresql://u@db.example.com/b?sslmode=require"], "store.url"),
        (["store.url=postgresql://u@127.0.0.1,db.example.com/b?sslmode=disable"], "store.url"),
        (["store.url=postgresql:///b?host=db.example.com&sslmode=prefer"], "store.url"),
        (["store.url=postgresql://u@127.0.0.1/b?hostaddr=10.0.0.9&sslmode=disable"], "store.url"),
        (["store.url=postgresql://u@db.localhost/b?sslmode=disable"], "store.url"),
        (["store.url=postgresql://u@db.example%2Ca.localhost/b?sslmode=disable"], "store.url"),
        (["store.url=postgresql:///b?service=x&sslmode=disable"], "store.url"),
        (["store.client_cert_file=c"], "store.client_key_file"),
        (["upstream.url=https://h.example/api/v1/clusters/agent/ws?token=hush"], "upstream.url"),
        (["upstream.url=https://h.example/?a=1&Access_Token="], "upstream.url"),
        (["fallback.url=https://h.example/?token=hush"], "fallback.url"),
        (["fallback.client_cert_file=/c"], "fallback.client_key_file"),
        (["fallback.client_key_file=/k"], "fallback.client_cert_file"),
        (["fallback.proxy=socks5://p.example:1"], "fallback.proxy"),
        (["fallback.insecure_skip_verify=perhaps"], "fallback.insecure_skip_verify"),
        (["rollout.include="], "rollout.include"),
        (["fallback.url=http://example.com"], "fallback.url"),
        (["fallback.url=wss://example.com"], "fallback.url"),
        (["fallback.use_upstream_token=true"], "fallback.use_upstream_token"),
        (["identity.name=a\nb"], "identity.name"),
        (['identity.labels={"a\\u0000": "b"}'], "identity.labels"),
        (['commands.types=["a\\nb"]'], "commands.types"),
    ],
)
def test_what_makes_no_sense_is_one_fault(sets: list[str], path: str) -> None:
    assert faulty(*sets) == [path]


@pytest.mark.parametrize("path", sorted(PATTERNS))
def test_what_the_chart_refuses_is_a_fault_and_the_default_is_none(path: str) -> None:
    (default,) = [default for name, _, default in leaves() if name == path]
    texts = [default] if isinstance(default, str) else default
    assert all(re.search(PATTERNS[path], text) for text in texts)
    refused = [t for t in ("", "a b", "soon", "http://", "https://a b", "/?x", "#") if not re.search(PATTERNS[path], t)]
    assert refused
    for text in refused:
        value = text if isinstance(default, str) else json.dumps([text])
        assert faulty(f"{path}={value}") == [path], text


def test_a_broken_key_starts_no_second_fault() -> None:
    assert faulty("listen.host=0.0.0.0", "listen.auth=of") == ["listen.auth"]
    assert faulty("listen.tls.cert_file=\n", "listen.tls.key_file=k") == ["listen.tls.cert_file"]
    assert faulty("upstream.reconnect.max_s=-1") == ["upstream.reconnect.max_s"]
    assert faulty("mode=htp", "fallback.url=") == ["mode"]


@pytest.mark.parametrize(
    "text,expected_s",
    [
        ("1970-01-02", 86_400.0),
        ("1970-01-01T00:00:01Z", 1.0),
        ("1970-01-01t01:00:00.5+01:00", 0.5),
    ],
)
def test_instants_are_unix_seconds(text: str, expected_s: float) -> None:
    assert parse_date_s(text) == expected_s
