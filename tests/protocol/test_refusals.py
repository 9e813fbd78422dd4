"""What only a WebSocket agent can serve is refused as a real agent would refuse it.

Rules: docs/reference/legacy-agents.md#33-controller-to-agent.
"""

from __future__ import annotations

from typing import Any

import pytest

from shim.protocol.controller_replies import LEFTOVER_TYPES, REASON, REFUSED_TYPES, refuse


@pytest.mark.parametrize(
    "kind, request_id, payload, answer",
    [
        ("proxy_request", "r", {"method": "GET"}, ("proxy_error", "r", {"error": REASON})),
        (
            "proxy_request",
            "r",
            {"supports_response_streaming": True},
            ("proxy_response_abort", "r", {"error": REASON}),
        ),
        ("proxy_request", "r", {"supports_response_streaming": "yes"}, ("proxy_error", "r", {"error": REASON})),
        ("proxy_request", "", {"method": "GET"}, None),
        ("proxy_request", "r", {}, None),
        ("tcp_tunnel_start", "r", {}, ("tcp_tunnel_close", "r", {"reason": "connection_failed", "error": REASON})),
        ("tcp_tunnel_start", "", {"tunnel_id": "t"}, None),
        ("ws_start", "r", {"stream_id": "s"}, ("proxy_error", "s", {"request_id": "s", "error": REASON})),
        ("proxy_websocket_start", "", {"stream_id": "s"}, ("proxy_error", "s", {"request_id": "s", "error": REASON})),
        ("ws_start", "r", {}, ("proxy_error", "r", {"request_id": "r", "error": REASON})),
        ("ws_start", "r", {"stream_id": 5}, ("proxy_error", "r", {"request_id": "r", "error": REASON})),
        ("ws_start", "", {}, None),
    ],
)
def test_refuse(kind: str, request_id: str, payload: dict[str, Any], answer: Any) -> None:
    assert kind in REFUSED_TYPES
    assert refuse(kind, request_id, payload) == answer


def test_nothing_is_both_refused_and_dropped() -> None:
    assert not REFUSED_TYPES & LEFTOVER_TYPES
