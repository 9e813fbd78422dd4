"""Settings of the process: which errors of the event loop are logged as errors."""

from __future__ import annotations

import asyncio
import logging

import pytest

from shim.process import report_loop_error

# As uvloop reports it: tests.chaos.harness.replicas found it in the log of a replica whose peer was cut off.
GONE = "unable to perform operation on <TCPTransport closed=True reading=False 0x55ff03746ca0>; the handler is closed"


@pytest.mark.parametrize(
    "error, protocol, logged",
    [
        (RuntimeError(GONE), True, []),
        (RuntimeError(GONE), False, ["Fatal error on SSL protocol"]),
        (RuntimeError("a defect"), True, ["Fatal error on SSL protocol"]),
        (ValueError(GONE), True, ["Fatal error on SSL protocol"]),
    ],
)
async def test_a_tls_connection_that_is_gone_is_no_error(
    caplog: pytest.LogCaptureFixture, error: Exception, protocol: bool, logged: list[str]
) -> None:
    context = {"message": "Fatal error on SSL protocol", "exception": error}
    with caplog.at_level(logging.ERROR):
        report_loop_error(asyncio.get_running_loop(), context | ({"protocol": asyncio.Protocol()} if protocol else {}))
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == logged
