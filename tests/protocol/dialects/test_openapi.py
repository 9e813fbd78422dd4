"""docs/reference/openapi.yaml matches the dialects: the same routes, and schemas that hold for real calls."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shim.agent_api.admission import Router
from shim.core.agent_calls import Accepted, Failed, Healthy, Outcome, TunnelInfo
from shim.errors import AgentError
from shim.protocol import dialects
from shim.protocol.dialects import Call
from tests.support.generations import ALL, Generation, Who
from tests.support.outcomes import COMMANDS, FAILURES, REGISTERED, TUNNELS

DOCUMENT: dict[str, Any] = yaml.load(
    (Path(__file__).parents[3] / "docs" / "reference" / "openapi.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader
)
LOADED = {dialect.NAME: dialect for dialect in dialects.load()}
ROUTER = Router(LOADED.values())
ROUTES = {(r.method, r.pattern): (name, r) for name, dialect in LOADED.items() for r in dialect.ROUTES}
OPERATIONS: dict[tuple[str, str], dict[str, Any]] = {
    (method.upper(), path): item
    for path, methods in DOCUMENT["paths"].items()
    for method, item in methods.items()
    if method != "parameters"
}
OUTCOMES: dict[str, st.SearchStrategy[Outcome]] = {
    "register": REGISTERED,
    "heartbeat": st.just(Accepted()),
    "status": st.just(Accepted()),
    "result": st.just(Accepted()),
    "poll": COMMANDS,
    "tunnel_poll": TUNNELS,
    "tunnel_info": REGISTERED.map(TunnelInfo),
    "health": st.just(Healthy()),
}


def resolved(item: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in item:
        found: Any = DOCUMENT
        for key in item["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        item = found
    return item


def faults(schema: dict[str, Any], value: Any) -> list[str]:
    from jsonschema import Draft202012Validator  # noqa: PLC0415 - takes a second, as in tests/support/manifests.py

    validator = Draft202012Validator({"components": DOCUMENT["components"], **schema})
    return [error.message for error in validator.iter_errors(value)]


def request_schema(method: str, path: str) -> dict[str, Any]:
    body = resolved(OPERATIONS[method, path]["requestBody"])
    schema: dict[str, Any] = body["content"]["application/json"]["schema"]
    return schema


def test_the_document_is_valid_openapi() -> None:
    import openapi_spec_validator  # noqa: PLC0415 - imports jsonschema

    assert list(openapi_spec_validator.OpenAPIV31SpecValidator(DOCUMENT).iter_errors()) == []


def test_every_route_is_documented_and_nothing_else() -> None:
    assert set(OPERATIONS) == set(ROUTES)
    for key, (dialect, route) in ROUTES.items():
        operation = OPERATIONS[key]
        assert operation["operationId"] == f"{dialect}.{route.operation}"
        assert operation["tags"] == [dialect]
        assert (operation.get("security") == []) is route.open
        assert ("requestBody" in operation) is (route.method == "POST")


@pytest.mark.parametrize("method, path", list(ROUTES))
def test_the_ids_of_a_path_are_its_parameters(method: str, path: str) -> None:
    named = [resolved(parameter)["name"] for parameter in DOCUMENT["paths"][path].get("parameters", [])]
    assert [f"{{{name}}}" for name in named] == [part for part in path.split("/") if part.startswith("{")]
    assert ROUTER.match(method, path.replace("{", "").replace("}", "")).params == dict(zip(named, named, strict=True))


@pytest.mark.parametrize("method, path", list(ROUTES))
def test_every_reply_has_its_headers_and_every_error_its_shape(method: str, path: str) -> None:
    for status, response in OPERATIONS[method, path]["responses"].items():
        found = resolved(response)
        assert {"X-Request-Id", "Deprecation", "Sunset", "Link"} <= set(found["headers"])
        if status in ("default", "503"):
            assert "Retry-After" in found["headers"]
        if not status.startswith("2"):
            assert faults(found["content"]["application/json"]["schema"], {"success": False, "error": "x"}) == []
            assert faults(found["content"]["application/json"]["schema"], {"error": "x"})


@pytest.mark.parametrize("generation", ALL, ids=lambda g: g.label)
def test_what_real_agents_send_is_documented(generation: Generation) -> None:
    for operation, (method, pattern) in generation.routes.items():
        if method == "POST":
            request = generation.request(operation, Who())
            assert faults(request_schema(method, pattern), request.body) == []


@pytest.mark.parametrize("method, path", [key for key in ROUTES if key[0] == "POST"])
@pytest.mark.parametrize(
    "body", [None, [], "x", {}, {"name": "n"}, {"agent_id": "a"}, {"success": 1}, {"agent_id": "a/b", "name": "n"}]
)
def test_what_is_refused_is_against_the_document(method: str, path: str, body: Any) -> None:
    dialect, route = ROUTES[method, path]
    ids = {name: "x" for name in ("agent_id", "cluster_id", "command_id") if f"{{{name}}}" in path}
    try:
        LOADED[dialect].parse(route.operation, Call(ids, body))
    except AgentError:
        assert faults(request_schema(method, path), body)


@given(st.data(), st.sampled_from(sorted(ROUTES)))
def test_every_reply_is_documented(data: st.DataObject, key: tuple[str, str]) -> None:
    dialect, route = ROUTES[key]
    outcome = data.draw(OUTCOMES[route.operation] | FAILURES)
    agent = data.draw(st.sampled_from(["Go-http-client/1.1", "curl/8.5.0"]))
    reply = LOADED[dialect].render(route.operation, outcome, Call({}, None, agent))
    responses = OPERATIONS[key]["responses"]
    found = resolved(responses.get(str(reply.status), responses["default"]))
    if reply.body is None:
        assert "content" not in found
    else:
        assert faults(found["content"]["application/json"]["schema"], reply.body) == []
    assert isinstance(outcome, Failed) == (str(reply.status) not in ("200", "204"))
