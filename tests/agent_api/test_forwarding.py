"""The vendor's reply as it goes on to the agent."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from shim.agent_api.forwarding import head
from shim.ports import ProxyResponse


async def pieces() -> AsyncGenerator[bytes, None]:
    yield b"x"


@pytest.mark.parametrize("status, chunked", [(200, True), (204, False), (304, False)])
def test_a_reply_that_has_no_body_has_no_chunks(status: int, chunked: bool) -> None:
    """The end of chunks would be taken for the next reply."""
    start, in_chunks = head(ProxyResponse(status, (), pieces()), {}, keep=True, http11=True)
    assert in_chunks is chunked
    assert (b"Transfer-Encoding" in start) is chunked
