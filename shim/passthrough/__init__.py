"""Modes `http` and `auto`, and `rollout.percent`: calls that go by the vendor's HTTP API (protocol.md §4)."""

from shim.passthrough.passthrough import Passthrough
from shim.passthrough.sunset import sunset_headers

__all__ = ["Passthrough", "sunset_headers"]
