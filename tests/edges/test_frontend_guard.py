"""Who may call: browsers, foreign host names, tokens; and the listener's own TLS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme

from shim.ports import Client
from shim.settings import Listen, TlsFiles
from tests.support.frontend import POLL, get, offering, running
from tests.support.frontend import Board as FakeBoard

POLL_PATH = "/api/v1/clusters/agent/c1/poll"


def authorized(token: str, scheme: str = "Bearer") -> bytes:
    return get(POLL_PATH, f"Authorization: {scheme} {token}")


@pytest.mark.parametrize(
    "listen,token,authorization,status,seen",
    [
        # a token of the shim's own: loopback trusts its pod, everybody else must know it
        (Listen(port=0), "t", None, 200, ""),
        (Listen(port=0), "t", "Bearer other", 200, "other"),
        (Listen(port=0, auth="required"), "t", "Bearer t", 200, "t"),
        (Listen(port=0, auth="required"), "t", "bearer  t ", 200, "t"),
        (Listen(port=0, auth="required"), "t", None, 401, None),
        (Listen(port=0, auth="required"), "t", "Bearer other", 401, None),
        (Listen(port=0, auth="required"), "t", "Bearer t2", 401, None),
        (Listen(port=0, auth="required"), "t", "Basic t", 401, None),
        (Listen(port=0, auth="required"), "", None, 401, None),
        (Listen(port=0, auth="required"), "", "Bearer ", 401, None),
        (Listen(host="0.0.0.0", port=0), "t", None, 401, None),
        (Listen(host="0.0.0.0", port=0), "t", "Bearer t", 200, "t"),
        (Listen(host="0.0.0.0", port=0, auth="off"), "t", None, 200, ""),
        # agents' own tokens: there must be one
        (Listen(port=0), None, "Bearer mine", 200, "mine"),
        (Listen(port=0), None, None, 401, None),
        (Listen(port=0, auth="off"), None, None, 401, None),
        (Listen(port=0), None, "Bearer two words", 401, None),
        (Listen(port=0), None, "Bearer t\xe9", 401, None),
    ],
)
async def test_tokens(
    listen: Listen, token: str | None, authorization: str | None, status: int, seen: str | None
) -> None:
    headers = [] if authorization is None else [f"Authorization: {authorization}"]
    async with running(listen, token=None if token is None else lambda: token) as house:
        reply = await house.ask(get(POLL_PATH, *headers))
        assert reply.status == status
        assert (reply.headers.get("www-authenticate") == "Bearer") is (status == 401)
        assert (await house.ask(get("/api/v1/health"))).status == 200, "health needs no token"
    tokens = [client.token for client in house.board.clients[:-1]]
    assert tokens == ([] if seen is None else [seen])


async def test_each_request_is_judged_by_its_own_token() -> None:
    async with running(token=None) as house:
        agent = await house.agent()
        for token in ("a", "a", "b"):
            await agent.send(authorized(token))
            assert (await agent.reply()).status == 200
        await agent.send(POLL)
        assert (await agent.reply()).status == 401
    assert [client.token for client in house.board.clients] == ["a", "a", "b"]


def test_a_token_is_never_shown() -> None:
    assert "canary" not in repr(Client("canary", 1))


@pytest.mark.parametrize(
    "headers,served",
    [
        (("Origin: https://evil.example",), False),
        (("Origin: null",), False),
        (("Sec-Fetch-Site: cross-site",), False),
        (("sec-fetch-site: none",), False),
        (("Sec-Fetch-Mode: cors",), True),  # Node's fetch
        ((), True),
    ],
)
async def test_browsers(headers: tuple[str, ...], served: bool) -> None:
    async with running() as house:
        reply = await house.ask(get("/api/v1/health", *headers))
        assert reply.status == (200 if served else 403)
        assert house.count("bad_requests_total", reason="guard") == (0 if served else 1)


@pytest.mark.needs("node")
async def test_fetch_of_node_is_no_browser() -> None:
    async with running(token=None) as house:
        script = (
            f"fetch('http://127.0.0.1:{house.port}{POLL_PATH}', {{headers: {{authorization: 'Bearer t'}}}})"
            ".then(r => process.exit(r.status === 200 ? 0 : 1))"
        )
        process = await asyncio.create_subprocess_exec("node", "-e", script)
        async with asyncio.timeout(30):
            assert await process.wait() == 0


@pytest.mark.parametrize(
    "listen,host,served",
    [
        (Listen(port=0), "localhost", True),
        (Listen(port=0), "LOCALHOST.:7080", True),
        (Listen(port=0), "127.0.0.1:7080", True),
        (Listen(port=0), "127.9.9.9", True),
        (Listen(port=0), "[::1]:7080", True),
        (Listen(port=0), "::1", True),
        (Listen(port=0), "evil.example", False),
        (Listen(port=0), "127.0.0.1.evil.example:7080", False),
        (Listen(port=0), "[::1].evil.example", False),
        (Listen(port=0), "localhost:evil", False),
        (Listen(port=0), "", False),
        (Listen(port=0, allowed_hosts=("Shim.Example",)), "shim.example:80", True),
        (Listen(port=0, allowed_hosts=("Shim.Example",)), "evil.example", False),
        (Listen(host="0.0.0.0", port=0, auth="off"), "any.example", True),
        (Listen(host="0.0.0.0", port=0, auth="off", allowed_hosts=("shim",)), "any.example", False),
        (Listen(host="0.0.0.0", port=0, auth="off", allowed_hosts=("shim",)), "shim", True),
        (Listen(host="0.0.0.0", port=0, auth="off", allowed_hosts=("shim",)), "localhost", True),
    ],
)
async def test_host_names(listen: Listen, host: str, served: bool) -> None:
    async with running(listen) as house:
        for _ in range(2):
            request = f"GET /api/v1/health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            assert (await house.ask(request)).status == (200 if served else 403)


async def test_many_host_names_do_not_pile_up() -> None:
    async with running() as house:
        agent = await house.agent()
        for n in range(300):
            await agent.send(f"GET /api/v1/health HTTP/1.1\r\nHost: {n}.example\r\n\r\n".encode())
            assert (await agent.reply()).status == 403
        assert len(house.frontend._guard._known) <= 256


async def test_many_paths_do_not_pile_up() -> None:
    async with running() as house:
        agent = await house.agent()
        for n in range(4200):
            await agent.send(get(f"/api/v1/health?{n}"))
            await agent.reply()
        assert len(house.frontend._routes) <= 4096


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path: Path) -> tuple[Listen, ssl.SSLContext]:
    """A listener's settings with a certificate, and a client's context that trusts it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "tls.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return Listen(port=0, tls=TlsFiles(cert_file=str(tmp_path / "tls.pem"))), context


@pytest.mark.parametrize("politely", [True, False])
async def test_a_tls_listener_tells_evidence_too(tls: tuple[Listen, ssl.SSLContext], politely: bool) -> None:
    listen, context = tls
    board = FakeBoard()
    board.script = offering()
    async with running(listen, board) as house:
        reader, writer = await asyncio.open_connection(house.host, house.port, ssl=context)
        for _ in range(2):
            writer.write(POLL)
            await reader.readuntil(b"\r\n\r\n")
            assert b"cmd-" in await reader.readuntil(b'"poll_frequency":5}')
        if politely:
            writer.close()
        else:
            writer.transport.abort()
        await board.until("clean")
    assert board.steps[:4] == ["call", "written", "next", "call"]


async def test_a_large_reply_over_tls(tls: tuple[Listen, ssl.SSLContext]) -> None:
    listen, context = tls
    board = FakeBoard()
    board.script = offering(3_000_000)
    async with running(listen, board) as house:
        reader, writer = await asyncio.open_connection(house.host, house.port, ssl=context, limit=10_000_000)
        writer.write(POLL)
        assert len(await reader.readuntil(b'"poll_frequency":5}')) > 3_000_000
        await board.until("written")
        writer.write(POLL.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        await reader.readuntil(b'"poll_frequency":5}')
        writer.close()
        await board.until("clean")


async def test_plain_http_on_a_tls_listener_and_old_tls(tls: tuple[Listen, ssl.SSLContext]) -> None:
    listen, context = tls
    async with running(listen) as house:
        agent = await house.agent()
        await agent.send(POLL)
        await agent.closed_by_peer()
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(house.host, house.port, ssl=context)
