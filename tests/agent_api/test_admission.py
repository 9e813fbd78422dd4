"""Routing: which request is which call, and which is none (docs/reference/protocol.md#1-legacy-side)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.agent_api.admission import Router, decode_id
from shim.errors import AgentError
from shim.protocol import dialects
from shim.protocol.dialects import Call, Dialect, Match
from shim.protocol.dialects import agents as agents_dialect
from shim.protocol.dialects._shared import valid_id
from tests.support.generations import ALL, Generation, Who

LOADED = dialects.load()
ROUTER = Router(LOADED)
ROUTES = [(dialect, route) for dialect in LOADED for route in dialect.ROUTES]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def status_of(router: Router, method: str, path: str) -> int:
    with pytest.raises(AgentError) as caught:
        router.match(method, path)
    assert path.strip("/") not in str(caught.value) or not path.strip("/")
    return caught.value.status


def described(match: Match) -> tuple[str, str, dict[str, str]]:
    return match.dialect.NAME, match.route.operation, match.params


def test_dialects_are_found_by_name() -> None:
    assert [dialect.NAME for dialect in LOADED] == ["agents", "clusters", "clusters_agent", "common"]


@pytest.mark.parametrize("generation", ALL, ids=lambda g: g.label)
def test_every_call_of_every_generation_is_routed(generation: Generation) -> None:
    who = Who(agent_id="6f1c8a52-11aa", cluster_id="c-1", command_id="cmd_1")
    ids = {"agent_id": who.agent_id, "cluster_id": who.cluster_id, "command_id": who.command_id}
    for operation, (_, pattern) in generation.routes.items():
        request = generation.request(operation, who)
        for path in (request.path, "/" + request.path):  # a setting that ends in a slash gives `//api`
            dialect, found, params = described(ROUTER.match(request.method, path))
            shared = operation in ("health", "tunnel_poll")
            assert (dialect, found) == ("common" if shared else generation.dialect, operation)
            assert params == {name: value for name, value in ids.items() if f"{{{name}}}" in pattern}


@pytest.mark.parametrize("path", ["/api/v1/health", "//api/v1/health", "////api/v1/health"])
def test_leading_slashes_are_folded(path: str) -> None:
    assert ROUTER.match("GET", path).route.operation == "health"


@pytest.mark.parametrize("base", ["/base/path", "base/path/", "/base/path//"])
@pytest.mark.parametrize("prefix", ["/base/path", "//base/path", "/base/path/", "/base/path//", ""])
def test_a_base_path_is_accepted_with_and_without(base: str, prefix: str) -> None:
    match = Router(LOADED, base).match("POST", f"{prefix}/api/v1/agents/a-1/heartbeat")
    assert described(match) == ("agents", "heartbeat", {"agent_id": "a-1"})


def test_a_base_path_that_begins_a_route_hides_nothing() -> None:
    router = Router(LOADED, "/clusters")
    assert described(router.match("POST", "/clusters/a-1")) == ("clusters", "register", {"agent_id": "a-1"})
    assert described(router.match("POST", "/clusters/clusters/a-1")) == ("clusters", "register", {"agent_id": "a-1"})
    assert router.match("GET", "/clusters/api/v1/health").route.operation == "health"


def test_another_base_path_is_no_route() -> None:
    assert status_of(Router(LOADED, "/base"), "GET", "/other/api/v1/health") == 404
    assert status_of(ROUTER, "GET", "/base/api/v1/health") == 404


@pytest.mark.parametrize(
    "raw, ident",
    [
        ("agent-host-1f", "agent-host-1f"),
        ("a.b~c:d@e", "a.b~c:d@e"),
        ("a%20b", "a b"),
        ("a b", "a b"),
        ("%41", "A"),
        ("%c3%bc", "ü"),
        ("ü", "ü"),
        ("%252f", "%2f"),
        ("%zz", "%zz"),
        ("...", "..."),
        ("a" * 256, "a" * 256),
        ("%61" * 256, "a" * 256),
        ("register", "register"),
    ],
)
def test_ids_are_decoded_once(raw: str, ident: str) -> None:
    match = ROUTER.match("POST", f"/api/v1/clusters/agent/{raw}/heartbeat")
    assert match.params == {"cluster_id": ident}


@pytest.mark.parametrize(
    "raw",
    [
        *("", ".", "..", "%2e%2e", "%2f", "a%2Fb", "%00", "a%0ab", "%7f", "%ff", "%c3", "\udcff", "\ud800"),
        *("a" * 257, "a" * 4096, "%61" * 257, "%c2%a0", "%e2%80%ae", "ü" * 129),
    ],
)
def test_ids_that_are_refused(raw: str) -> None:
    assert status_of(ROUTER, "POST", f"/api/v1/clusters/agent/{raw}/heartbeat") == 400


@pytest.mark.parametrize("raw", ["..", "%2f", "%00", "a" * 4096])
def test_command_ids_are_checked_too(raw: str) -> None:
    assert status_of(ROUTER, "POST", f"/api/v1/agents/a-1/commands/{raw}/result") == 400


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/api",
        "/api/v1/agents",
        "/api/v1/health/",
        "/api/v1//health",
        "/api/v1/agents/a-1/heartbeat/",
        "/api/v1/agents//a-1/heartbeat",
        "/api/v1/agents/a-1/commands/c-1",
        "/api/v1/agents/a-1/commands/c/1/result",
        "/api/v1/%61gents/a-1/heartbeat",
        "/API/v1/health",
        "/clusters",
        "/clusters/a/b",
        "/api/v1/clusters/agent/ws",
        "/api/v1/runner/ws",
        "/" + "a/" * 2000,
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_anything_else_is_not_found(method: str, path: str) -> None:
    assert status_of(ROUTER, method, path) == 404


@pytest.mark.parametrize("dialect, route", ROUTES, ids=lambda v: getattr(v, "pattern", None) or v.NAME)
def test_other_methods_are_not_allowed_and_say_which_is(dialect: Dialect, route: dialects.Route) -> None:
    path = route.pattern.replace("{", "").replace("}", "")
    for method in METHODS:
        if method == route.method:
            assert ROUTER.match(method, path).route is route
        else:
            with pytest.raises(AgentError) as caught:
                ROUTER.match(method, path)
            assert (caught.value.status, caught.value.allow) == (405, (route.method,))


def test_only_status_bodies_are_large_and_only_health_is_open() -> None:
    assert [route.operation for _, route in ROUTES if route.large] == ["status"]
    assert [route.operation for _, route in ROUTES if route.open] == ["health"]


def test_two_dialects_cannot_claim_one_route() -> None:
    with pytest.raises(ValueError, match="two dialects claim POST /api/v1/agents/register"):
        Router([agents_dialect, agents_dialect])


@given(st.sampled_from(METHODS), st.text(st.characters(exclude_categories=())))
def test_any_path_is_routed_or_refused(method: str, path: str) -> None:
    try:
        ROUTER.match(method, path)
    except AgentError as error:
        assert error.status in (400, 404, 405)  # noqa: PT017 - any other exception is the failure


@given(st.text(st.characters(exclude_categories=())) | st.binary())
def test_a_valid_id_is_what_protocol_says(data: str | bytes) -> None:
    try:
        ident = valid_id(data, "agent_id")
    except AgentError as error:
        assert (error.status, str(error)) == (400, "invalid agent_id")  # noqa: PT017 - as above
    else:
        assert 1 <= len(ident.encode()) <= 256
        assert ident.isprintable()
        assert "/" not in ident
        assert ident not in (".", "..")


@given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=80))
def test_percent_encoding_changes_nothing(ident: str) -> None:
    try:
        checked = valid_id(ident)
    except AgentError:
        return
    assert decode_id("".join(f"%{byte:02x}" for byte in ident.encode())) == checked


def test_a_body_with_secrets_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(Call({"agent_id": "a"}, {"token": "hunter2"}))
