"""Reading requests: the field map, leniency, secrets, and the errors of bad input.

The map is in docs/reference/legacy-agents.md#4-field-mapping-http-to-websocket.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.agent_api.admission import Router
from shim.core.agent_calls import HeartbeatCall, RegisterCall, ResultCall, SessionTarget, StatusCall, TargetKind
from shim.errors import AgentError
from shim.protocol import dialects
from shim.protocol.dialects import Call, Dialect, Route
from tests.support.generations import ALL, GENERATIONS, Generation, Who

LOADED = dialects.load()
DIALECTS = {dialect.NAME: dialect for dialect in LOADED}
ROUTER = Router(LOADED)
WHO = Who(agent_id="6f1c8a52-11aa", cluster_id="c-7", name="prod")
PARAMS = {"agent_id": "path-agent", "cluster_id": "path-cluster", "command_id": "cmd-1"}


def parse(dialect: str, operation: str, body: Any) -> Any:
    return DIALECTS[dialect].parse(operation, Call(PARAMS, body))


def register(body: dict[str, Any], dialect: str = "clusters_agent") -> RegisterCall:
    call = parse(dialect, "register", {"agent_id": "a", "name": "n"} | body)
    assert isinstance(call, RegisterCall)
    return call


def heartbeat(dialect: str, body: Any) -> HeartbeatCall:
    call = parse(dialect, "heartbeat", body)
    assert isinstance(call, HeartbeatCall)
    return call


def result(body: Any) -> ResultCall:
    call = parse("clusters_agent", "result", body)
    assert isinstance(call, ResultCall)
    return call


def error_of(dialect: str, operation: str, body: Any) -> tuple[int, str]:
    with pytest.raises(AgentError) as caught:
        parse(dialect, operation, body)
    return caught.value.status, str(caught.value)


def sent_by(generation: Generation, operation: str) -> Any:
    request = generation.request(operation, WHO)
    match = ROUTER.match(request.method, request.path)
    return match.dialect.parse(match.route.operation, Call(match.params, request.body, request.user_agent))


# --- register ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ALL, ids=lambda g: g.label)
def test_each_generation_registers_with_what_it_sends(generation: Generation) -> None:
    call = sent_by(generation, "register")
    assert (call.dialect, call.agent_id, call.name) == (generation.dialect, WHO.agent_id, WHO.name)
    assert call.known_by_agent is (generation.dialect == "agents")
    assert call.payload["agent_id"] == WHO.agent_id
    assert call.payload["name"] == WHO.name
    if generation.label == "guide":
        assert set(call.payload) == {"agent_id", "name", "k8s_version", "agent_version"}
        return
    assert call.payload["hostname"] == "node-1"
    assert call.payload["labels"] == {"hostname": "node-1", "agent.pipeops.io/version": "v1.2.3"}
    wanted = {"agent_id", "name", "hostname", "labels"}
    if generation.label.startswith("A"):
        wanted |= {"agent_version"}
    else:
        wanted |= {"k8s_version", "server_ip", "server_specs"}
    if generation.label.startswith("B") and generation.label not in {"B1", "B2"}:
        assert call.secret == "sa-token"
    if generation.label.startswith("B"):
        wanted |= {"tunnel_port_config"}
        assert call.payload["tunnel_port_config"] == {"kubernetes_api": 6443, "kubelet": 10250, "agent_http": 8080}
    if generation.label in ("B4", "B5", "B6", "B7"):
        wanted |= {"agent_version", "region", "cloud_provider", "metadata"}
    assert set(call.payload) == wanted


@pytest.mark.parametrize(
    "body, agent_id",
    [
        ({"agent_id": "one", "id": "two"}, "one"),
        ({"id": "two"}, "two"),
        ({"agent_id": "", "id": "two"}, "two"),
        ({"agent_id": None, "id": "two"}, "two"),
        ({"agent_id": {}, "id": "two"}, "two"),
        ({"agent_id": 17}, "17"),
        ({}, "path-agent"),
        ({"agent_id": True}, "path-agent"),
    ],
)
def test_agent_id_is_agent_id_else_id_else_the_path(body: dict[str, Any], agent_id: str) -> None:
    call = parse("clusters", "register", {"name": "n"} | body)
    assert call.agent_id == call.payload["agent_id"] == agent_id


@pytest.mark.parametrize(
    "body, name",
    [
        ({"cluster_name": "c", "name": "n"}, "c"),
        ({"cluster_name": "", "name": "n"}, "n"),
        ({"cluster_name": [], "name": "n"}, "n"),
        ({"name": 7}, "7"),
        ({"cluster_name": "c"}, "c"),
    ],
)
@pytest.mark.parametrize("dialect", ["agents", "clusters", "clusters_agent"])
def test_name_is_cluster_name_else_name(dialect: str, body: dict[str, Any], name: str) -> None:
    call = parse(dialect, "register", {"agent_id": "a"} | body)
    assert call.name == call.payload["name"] == name


@pytest.mark.parametrize(
    "body, message",
    [
        ({"agent_id": "a"}, "name or cluster_name is required"),
        ({"agent_id": "a", "name": "", "cluster_name": None}, "name or cluster_name is required"),
        ({"agent_id": "a/b", "name": "n"}, "invalid agent_id"),
        ({"agent_id": "..", "name": "n"}, "invalid agent_id"),
        ({"agent_id": "a" * 257, "name": "n"}, "invalid agent_id"),
        ({"agent_id": "\ud800", "name": "n"}, "invalid agent_id"),
    ],
)
@pytest.mark.parametrize("dialect", ["agents", "clusters", "clusters_agent"])
def test_what_could_never_register_is_a_clear_error(dialect: str, body: dict[str, Any], message: str) -> None:
    assert error_of(dialect, "register", body) == (400, message)


@pytest.mark.parametrize("dialect", ["agents", "clusters_agent"])
def test_an_agent_id_is_required_where_the_path_has_none(dialect: str) -> None:
    with pytest.raises(AgentError, match="agent_id is required"):
        DIALECTS[dialect].parse("register", Call({}, {"name": "n"}))


def test_fields_of_a_wrong_type_are_text_or_absent() -> None:
    call = register(
        {
            "k8s_version": 1.28,
            "hostname": 12,
            "region": ["x"],
            "server_ip": None,
            "cloud_provider": False,
            "labels": {"a": 1, "b": None, "c": "", "d": {"e": "f"}, "g": True},
            "server_specs": "big",
            "tunnel_port_config": [],
            "metadata": 5,
        }
    )
    assert call.payload == {
        "agent_id": "a",
        "name": "n",
        "k8s_version": "1.28",
        "hostname": "12",
        "labels": {"a": "1", "c": ""},
    }


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**5000, -(10**5000), 2**64], ids=range(5))
def test_numbers_that_are_no_texts_are_absent(value: Any) -> None:
    assert "region" not in register({"region": value}).payload


def test_the_newer_name_of_a_field_wins() -> None:
    call = register({"tunnel_port_config": {"kubelet": 1}, "tunnel_config": {"kubelet": 2}, "hostname": "own"})
    assert call.payload["tunnel_port_config"] == {"kubelet": 1}
    both = register({"agent_version": "v2", "version": "v1", "hostname": "own", "labels": {"hostname": "label"}})
    assert (both.payload["agent_version"], both.payload["hostname"]) == ("v2", "own")


def test_unknown_keys_are_kept() -> None:
    extra = {
        "zone": "eu-1",
        "capacity": {"gpu": [1, 2]},
        "runner_endpoint": "https://r",
        "enabled": False,
        "none": None,
    }
    assert register(extra).payload == {"agent_id": "a", "name": "n"} | extra


@pytest.mark.parametrize(
    "key",
    ["status", "last_seen", "control_plane_url", "server_code", "cluster_url", "cluster_cert_data", "features"],
)
def test_fields_that_the_websocket_has_not_are_dropped(key: str) -> None:
    assert key not in register({key: "x"}).payload


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda g: g.label)
def test_monitoring_of_a_register_is_dropped(generation: Generation) -> None:
    call = sent_by(generation, "register")
    assert not [key for key in call.payload if "prometheus" in key or "opencost" in key]
    assert "monitoring-password" not in json.dumps(call.payload)


@pytest.mark.parametrize(
    "key",
    [
        *("token", "k8s_service_token", "runner_token", "cluster_token", "Token", "password", "db_passwd", "api_key"),
        *(
            "apiKey",
            "private_key",
            "client_secret",
            "credentials",
            "Authorization",
            "cookie",
            "kubeconfig",
            "accessKey",
        ),
    ],
)
@pytest.mark.parametrize("dialect", ["agents", "clusters", "clusters_agent"])
def test_no_secret_gets_into_what_is_stored_or_shown(dialect: str, key: str) -> None:
    body = {key: "hunter2", "extra": {"deep": [{key: "hunter2"}]}, "metadata": {key: "hunter2", "agent_mode": "vm"}}
    call = register(body, dialect)
    assert "hunter2" not in json.dumps(call.payload)
    assert "hunter2" not in repr(call)
    assert call.payload["extra"] == {"deep": [{}]}
    assert call.payload["metadata"] == {"agent_mode": "vm"}


@pytest.mark.parametrize(
    "dialect, body, secret",
    [
        ("clusters_agent", {"k8s_service_token": "sa"}, "sa"),
        ("clusters_agent", {"token": "other"}, ""),
        ("clusters", {"token": "sa"}, "sa"),
        ("clusters", {"token": "", "k8s_service_token": "sa"}, "sa"),
        ("agents", {"token": "other"}, ""),
        ("clusters", {"token": {"a": 1}}, ""),
    ],
)
def test_the_service_account_token_stands_apart(dialect: str, body: dict[str, Any], secret: str) -> None:
    assert register(body, dialect).secret == secret


# --- heartbeat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda g: g.label)
def test_each_generation_heartbeats_with_what_it_sends(generation: Generation) -> None:
    call = sent_by(generation, "heartbeat")
    by_agent = generation.dialect == "agents"
    assert call.target == (
        SessionTarget(TargetKind.AGENT, WHO.agent_id) if by_agent else SessionTarget(TargetKind.CLUSTER, WHO.cluster_id)
    )
    assert call.agent_id == WHO.agent_id
    assert (call.status, call.tunnel_status) == (
        ("connected", "disconnected") if by_agent else ("healthy", "connected")
    )
    assert call.payload["metadata"]["version"] == "v1.2.3"
    assert set(call.payload) == {"metadata"}
    assert call.known == ({"name": "prod"} if by_agent else {}) | {"agent_version": "v1.2.3"}
    assert "cluster-token" not in repr(call) + json.dumps(call.payload)


@pytest.mark.parametrize("dialect, secret", [("clusters", "sa"), ("clusters_agent", ""), ("agents", "")])
def test_one_generation_repeats_its_service_account_token(dialect: str, secret: str) -> None:
    call = heartbeat(dialect, {"token": "sa"})
    assert call.secret == secret
    assert "sa" not in repr(call.payload) + repr(call.known)


def test_the_path_wins_over_the_body() -> None:
    assert heartbeat("clusters_agent", {"cluster_id": "other"}).target == SessionTarget(
        TargetKind.CLUSTER, "path-cluster"
    )
    call = heartbeat("agents", {"agent_id": "other"})
    assert (call.target, call.agent_id) == (SessionTarget(TargetKind.AGENT, "path-agent"), "path-agent")


def test_the_guides_heartbeat_needs_no_agent_id() -> None:
    call = heartbeat("clusters_agent", {"cluster_id": "path-cluster", "status": "active"})
    assert (call.agent_id, call.status, call.tunnel_status, call.payload, call.known) == ("", "active", "", {}, {})


@pytest.mark.parametrize(
    "body, target",
    [
        ({"cluster_id": "c-9"}, SessionTarget(TargetKind.CLUSTER, "c-9")),
        ({"cluster_id": 9}, SessionTarget(TargetKind.CLUSTER, "9")),
        ({"cluster_id": ""}, SessionTarget(TargetKind.ALIAS, "path-agent")),
        ({"cluster_id": None}, SessionTarget(TargetKind.ALIAS, "path-agent")),
        ({}, SessionTarget(TargetKind.ALIAS, "path-agent")),
    ],
)
def test_b3_names_its_cluster_in_the_body_else_its_agent(body: dict[str, Any], target: SessionTarget) -> None:
    assert heartbeat("clusters", body).target == target


@pytest.mark.parametrize("ident", ["a/b", "..", "x" * 257, "a\nb", "\udc00"])
def test_ids_in_heartbeats_are_checked(ident: str) -> None:
    assert error_of("clusters", "heartbeat", {"cluster_id": ident}) == (400, "invalid cluster_id")
    assert error_of("clusters_agent", "heartbeat", {"agent_id": ident}) == (400, "invalid agent_id")


def test_an_a_agents_own_tunnel_status_is_kept() -> None:
    assert heartbeat("agents", {"tunnel_status": "connected", "proxy_status": "direct"}).tunnel_status == "connected"


def test_a_monitoring_group_goes_up_only_with_its_url() -> None:
    body = {
        "prometheus_url": "http://p",
        "prometheus_username": "u",
        "prometheus_password": "hunter2",
        "prometheus_ssl": False,
        "tunnel_prometheus_port": 9090,
        "loki_url": "",
        "loki_username": "u",
        "grafana_username": "u",
        "opencost_base_url": "http://o",
        "opencost_username": "",
        "opencost_password": 5,
        "grafana_url": None,
    }
    call = heartbeat("clusters_agent", body)
    assert call.payload == {
        "prometheus_url": "http://p",
        "prometheus_username": "u",
        "prometheus_password": "hunter2",
        "prometheus_ssl": False,
        "opencost_base_url": "http://o",
        "opencost_password": "5",
    }
    assert "hunter2" not in repr(call)


def test_what_a_heartbeat_tells_of_its_agent() -> None:
    body = {
        "cluster_name": "prod",
        "region": "eu",
        "metadata": {"agent_version": "v2", "version": "v1", "k8s_version": "v1.30", "hostname": "h", "region": "us"},
    }
    assert heartbeat("clusters_agent", body).known == {
        "name": "prod",
        "agent_version": "v2",
        "k8s_version": "v1.30",
        "hostname": "h",
        "region": "eu",
    }


def test_metadata_that_is_no_object_is_left_out() -> None:
    call = heartbeat("agents", {"status": 1, "metadata": ["x"], "cluster_name": {"a": 1}})
    assert (call.status, call.payload, call.known) == ("1", {}, {})


# --- status, result ---------------------------------------------------------------------------------------------------


def test_a_status_goes_up_as_it_is() -> None:
    body = {"nodes": None, "pods": [{"name": "p"}], "anything": 1}
    assert parse("agents", "status", body) == StatusCall("agents", SessionTarget(TargetKind.AGENT, "path-agent"), body)


@pytest.mark.parametrize(
    "dialect, kind, ident", [("agents", TargetKind.AGENT, "agent"), ("clusters_agent", TargetKind.CLUSTER, "cluster")]
)
def test_a_result_belongs_to_its_session_and_command(dialect: str, kind: TargetKind, ident: str) -> None:
    body = {
        "success": False,
        "output": "o",
        "error": "e",
        "metadata": {"k": [1]},
        "timestamp": "2025-10-08T00:00:00.5+02:00",
    }
    expected = ResultCall(dialect, SessionTarget(kind, f"path-{ident}"), "cmd-1", body)
    assert parse(dialect, "result", body | {"exit_code": 3}) == expected


@pytest.mark.parametrize("success", ["true", 1, 0, None, [], {}])
def test_success_must_be_a_boolean(success: Any) -> None:
    assert error_of("agents", "result", {"success": success}) == (400, "success must be a boolean")
    assert error_of("clusters_agent", "result", {"output": "x"}) == (400, "success must be a boolean")


def test_a_results_other_fields_are_read_leniently() -> None:
    body = {"success": True, "output": {"pods": [1, True]}, "error": 7, "metadata": "x", "timestamp": "now"}
    assert result(body).body == {"success": True, "output": '{"pods":[1,true]}', "error": "7"}
    assert result({"success": True, "output": None, "error": ""}).body == {"success": True, "error": ""}


def test_an_output_that_is_no_text_at_all_is_an_error() -> None:
    for output in (["\ud800"], {"n": 10**5000}):
        assert error_of("agents", "result", {"success": True, "output": output})[0] == 400


# --- any input --------------------------------------------------------------------------------------------------------

READING_BODIES = [(dialect, route) for dialect in LOADED for route in dialect.ROUTES if route.method == "POST"]


@pytest.mark.parametrize("dialect, route", READING_BODIES, ids=lambda v: getattr(v, "pattern", None) or v.NAME)
@pytest.mark.parametrize("body", [None, [], "x", 1, True, [{}]])
def test_a_body_must_be_an_object(dialect: Dialect, route: Route, body: Any) -> None:
    with pytest.raises(AgentError, match="the body must be a JSON object") as caught:
        dialect.parse(route.operation, Call(PARAMS, body))
    assert caught.value.status == 400


@pytest.mark.parametrize("dialect, route", READING_BODIES, ids=lambda v: getattr(v, "pattern", None) or v.NAME)
def test_a_body_must_not_be_nested_without_end(dialect: Dialect, route: Route) -> None:
    body: Any = {}
    for _ in range(3000):
        body = {"x": [body]}
    with pytest.raises(AgentError, match="nested too deeply"):
        dialect.parse(route.operation, Call(PARAMS, {"agent_id": "a", "name": "n", "success": True, "metadata": body}))


KEYS = [
    *("agent_id", "id", "name", "cluster_name", "cluster_id", "token", "version", "labels", "metadata", "server_specs"),
    *("tunnel_config", "status", "tunnel_status", "prometheus_url", "loki_ssl", "success", "output", "timestamp", "x"),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=6),
    max_leaves=30,
)
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(st.sampled_from([(d, r) for d in LOADED for r in d.ROUTES]), JSON, ANY_TEXT, ANY_TEXT)
def test_any_json_and_any_ids_are_a_call_or_a_bad_request(
    which: tuple[Dialect, Route], body: Any, ident: str, user_agent: str
) -> None:
    dialect, route = which
    params = dict.fromkeys(("agent_id", "cluster_id", "command_id"), ident)
    try:
        call = dialect.parse(route.operation, Call(params, body, user_agent))
    except AgentError as error:
        assert error.status == 400  # noqa: PT017 - any other exception is the failure
        return
    if isinstance(call, RegisterCall):
        assert call.agent_id
        assert call.name
        assert not [key for key in call.payload if "token" in key.lower()]
