"""Every module of the package has its tests: in the module of the same name, or where this table says.

A newcomer who changes a module finds its tests at once, and a module without any is noticed when it is added.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHIM = TESTS.parent / "shim"

ELSEWHERE = {
    # What an HTTP server does is tried on its port, with all its parts.
    "admin/connection_limit.py": "security/test_admin_limits.py",
    "admin/server.py": "e2e/test_admin_port.py",
    "agent_api/agent_websocket.py": "e2e/test_websocket_agents.py",
    "agent_api/responses.py": "agent_api/test_server.py",
    "agent_api/server_context.py": "agent_api/test_server.py",
    "listening.py": "security/test_listening.py",
    # The whole bridge, by the port that agents' calls come through.
    "bridge/agent_calls.py": "agent_api/test_request_handler.py",
    "bridge/bridge.py": "bridge/test_store.py",
    "bridge/session_persistence.py": "bridge/test_session_registry.py",
    "runtime.py": "test_app.py",
    # Commands are tried as commands.
    "cli/admin_client.py": "e2e/test_operate.py",
    "cli/admin_commands.py": "e2e/test_operate.py",
    "cli/standard_input.py": "cli/test_main.py",
    "cli/status.py": "e2e/test_operate.py",
    "cli/doctor/report.py": "cli/doctor/test_sources.py",
    "cli/inject/sidecar.py": "cli/inject/test_same_pod.py",
    "cli/rollout/sources.py": "e2e/test_rollout.py",
    # Types and constants, tried by what uses them.
    "config/settings.py": "config/test_loader.py",
    "config/yaml_file.py": "config/test_loader.py",
    "core/agent_calls.py": "protocol/dialects/test_requests.py",
    "core/bounds.py": "protocol/dialects/test_bounds.py",
    "core/records.py": "store/test_contract.py",
    "errors.py": "config/test_loader.py",
    "ports.py": "store/test_contract.py",
    # The choice between link and fallback, by whole processes.
    "fallback/policy.py": "e2e/test_modes.py",
    "fallback/websocket_proxy.py": "e2e/test_websocket_agents.py",
    # What an operator sees and does.
    "management/call_status.py": "management/test_status_builder.py",
    "management/command_api.py": "e2e/test_operate.py",
    "management/subject.py": "management/test_status_builder.py",
    # A dialect is a table; requests and replies of all dialects are tried with the same cases.
    "protocol/dialects/_shared.py": "protocol/dialects/test_requests.py",
    "protocol/dialects/agents.py": "protocol/dialects/test_requests.py",
    "protocol/dialects/clusters.py": "protocol/dialects/test_requests.py",
    "protocol/dialects/clusters_agent.py": "protocol/dialects/test_requests.py",
    "protocol/dialects/common.py": "protocol/dialects/test_requests.py",
    "store/database.py": "store/test_contract.py",
    "telemetry.py": "e2e/test_telemetry.py",
    # One dial, with all that it needs.
    "upstream/dial_errors.py": "upstream/test_dialler.py",
    "upstream/http_client.py": "upstream/test_dialler.py",
}
MODULES = sorted(
    str(path.relative_to(SHIM)) for path in SHIM.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_tests(module: str) -> None:
    beside = TESTS / Path(module).with_name(f"test_{Path(module).name}")
    assert beside.exists() != (module in ELSEWHERE), f"neither {beside} nor a line of the table, or both"
    assert (TESTS / ELSEWHERE.get(module, beside)).exists()


def test_the_table_names_no_module_that_is_gone() -> None:
    assert set(ELSEWHERE) <= set(MODULES)
