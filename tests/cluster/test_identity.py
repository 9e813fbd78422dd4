"""A replica's certificate: served over TLS, and recognised by its fingerprint."""

from __future__ import annotations

import asyncio
import time

import pytest

pytest.importorskip("cryptography")

from shim.cluster.connection_pool import fingerprint_of, make_identity
from tests.support.replicas import any_certificate


async def test_the_fingerprint_is_that_of_the_certificate_that_is_served() -> None:
    context, fingerprint = make_identity(time.time())
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        host, port = server.sockets[0].getsockname()
        _, writer = await asyncio.open_connection(host, port, ssl=any_certificate())
        served = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
    assert fingerprint_of(served) == fingerprint


def test_no_two_replicas_have_the_same_certificate() -> None:
    assert make_identity(0.0)[1] != make_identity(0.0)[1]


async def test_no_session_is_kept_for_a_connection_that_nobody_will_resume() -> None:
    context, _ = make_identity(time.time())
    server = await asyncio.start_server(lambda _reader, writer: writer.write(b"hello"), "127.0.0.1", 0, ssl=context)
    async with server:
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port, ssl=any_certificate())
        assert await reader.readexactly(5) == b"hello"  # tickets would have come before it
        assert not writer.get_extra_info("ssl_object").session.has_ticket
        writer.close()
