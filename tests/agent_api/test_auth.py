"""Who may call: browsers, foreign host names, tokens; and the listener's own TLS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography import x509

from shim.config.loader import read_secret
from shim.config.settings import Listen, TlsFiles
from shim.ports import Caller
from tests.support.frontend import POLL, House, get, offering, running
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
    tokens = [client.token for client in house.board.callers[:-1]]
    assert tokens == ([] if seen is None else [seen])


async def test_each_request_is_judged_by_its_own_token() -> None:
    async with running(token=None) as house:
        agent = await house.agent()
        for token in ("a", "a", "b"):
            await agent.send(authorized(token))
            assert (await agent.reply()).status == 200
        await agent.send(POLL)
        assert (await agent.reply()).status == 401
    assert [client.token for client in house.board.callers] == ["a", "a", "b"]


def test_a_token_is_never_shown() -> None:
    assert "canary" not in repr(Caller("canary", 1))


async def test_a_token_of_the_shims_own_that_cannot_be_read_is_no_defect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    async with running(
        Listen(port=0, auth="required"), token=lambda: read_secret(str(file), "upstream.token_file")
    ) as house:
        reply = await house.ask(authorized("t"))
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        file.write_text("t")
        assert (await house.ask(authorized("t"))).status == 200
    assert "defect" not in caplog.text


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
        async with asyncio.timeout(60):
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
        (Listen(port=0), "evil.localhost", False),
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
        assert len(house.frontend._handler._guard._known) <= 256


async def test_many_paths_do_not_pile_up() -> None:
    async with running() as house:
        agent = await house.agent()
        for n in range(4200):
            await agent.send(get(f"/api/v1/health?{n}"))
            await agent.reply()
        assert len(house.frontend._handler._routes) <= 4096


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


class Certificates:
    """The listener's files as a Secret's volume has them, and clients that tell what they were shown."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.listen = Listen(
            port=0,
            keepalive_s=60,
            tls=TlsFiles(cert_file=str(folder / "data" / "tls.crt"), key_file=str(folder / "data" / "tls.key")),
        )
        self._folder = folder
        self._number = 0

    def put(self, *names: str) -> int:
        """Swap the symlink of the folder to a new pair; returns the certificate's serial number."""
        issued = self.authority.issue_cert(*names)
        self.put_bytes(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
        return x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()).serial_number

    def put_bytes(self, certificate: bytes, key: bytes) -> None:
        self._number += 1
        version = self._folder / f"version-{self._number}"
        version.mkdir()
        (version / "tls.crt").write_bytes(certificate)
        (version / "tls.key").write_bytes(key)
        (self._folder / "new").symlink_to(version.name)
        (self._folder / "new").replace(self._folder / "data")

    async def connect(self, house: House, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
        """Connect with this server name, or none as clients do that dial an address; what certificate was shown."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        context.check_hostname = name is not None
        reader, writer = await asyncio.open_connection(house.host, house.port, ssl=context, server_hostname=name or "")
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return reader, writer, x509.load_der_x509_certificate(shown).serial_number

    async def shown(self, house: House, name: str | None = "localhost") -> int:
        _, writer, serial = await self.connect(house, name)
        writer.transport.abort()
        return serial


async def test_a_replaced_certificate_is_shown_and_no_connection_is_dropped(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    first = certificates.put("localhost")
    async with running(certificates.listen) as house:
        reader, writer, serial = await certificates.connect(house, "localhost")
        assert serial == first
        second = certificates.put("localhost")
        assert await certificates.shown(house) == second
        assert await certificates.shown(house, None) == second, "a hello without a server name"
        writer.write(POLL)
        assert b" 200 " in await reader.readline()
        writer.transport.abort()


@pytest.mark.parametrize(
    "part, reason",
    [
        ("certificate", "no PEM certificate and key that fit each other (SSLError)"),
        ("key", "no PEM certificate and key that fit each other (KEY_VALUES_MISMATCH)"),
        ("files", "No such file or directory"),
    ],
)
async def test_a_certificate_that_cannot_be_used_leaves_the_old_one(
    tmp_path: Path, part: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = Certificates(tmp_path)
    first = certificates.put("localhost")
    other = certificates.authority.issue_cert("localhost")
    async with running(certificates.listen) as house:
        if part == "certificate":
            certificates.put_bytes(b"no certificate", other.private_key_pem.bytes())
        elif part == "key":
            mine = certificates.authority.issue_cert("localhost").cert_chain_pems[0].bytes()
            certificates.put_bytes(mine, other.private_key_pem.bytes())
        else:
            (tmp_path / "data").unlink()
        assert [await certificates.shown(house) for _ in range(2)] == [first, first]
        assert caplog.text.count("the old one stays") == caplog.text.count(f"the old one stays: {reason}\n") == 1
        second = certificates.put("localhost")
        assert await certificates.shown(house) == second
