"""The one rule by which link and HTTP fallback open connections, against real servers, proxies and certificates.

Each test dials both ways where both have to do with it: what holds for the link holds for the fallback.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trustme

from shim.config.settings import Fallback, Settings, Upstream
from shim.fallback.reverse_proxy import ReverseProxy, Unreachable
from shim.ports import Caller, DialFailure, DialRequest, ProxyRequest, ProxyResponse
from shim.protocol.http import fallback_url, ws_url
from shim.upstream import AiohttpUpstream
from shim.upstream.dialler import KEEP_S
from shim.upstream.http_client import MAX_INTERIM_RESPONSES
from tests.support.proxies import ForwardProxy, PickyProxy
from tests.support.sockets import Events, Tasks, accept_websocket, answer, dial, read_head, tcp_server

TOKEN = "token-canary"
UPGRADED = "101 Switching Protocols"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


@pytest.fixture
def client_files(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    client = authority.issue_cert("agent-shim")
    client.private_key_pem.write_to_path(tmp_path / "key.pem")
    client.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    return {"client_cert_file": str(tmp_path / "cert.pem"), "client_key_file": str(tmp_path / "key.pem")}


def serving(authority: trustme.CA, *names: str, client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or ("127.0.0.1",))).configure_cert(context)
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    return context


class Vendor:
    """Accepts WebSockets on `/ws` and answers 204 to everything else; keeps the heads."""

    def __init__(self) -> None:
        self.heads: list[dict[str, str]] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = await reader.readuntil(b"\r\n\r\n")
        again = asyncio.StreamReader()
        again.feed_data(raw)
        _, headers = await read_head(again)
        self.heads.append(headers)
        if "upgrade" in headers:
            again = asyncio.StreamReader()
            again.feed_data(raw)
            await accept_websocket(again, writer)
            await reader.read(1)
        else:
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")


async def link(upstream: Upstream, url: str, environ: dict[str, str] | None = None) -> str:
    """Dial as the link does: `ok`, or why not."""
    tasks = Tasks()
    port = AiohttpUpstream(upstream, tasks.spawn, environ=environ or {})
    try:
        outcome = await dial(port, DialRequest(ws_url(url, "/ws"), TOKEN), Events())
        return f"{outcome.reason}: {outcome.detail}" if isinstance(outcome, DialFailure) else "ok"
    finally:
        await port.close()
        await tasks.finish()


async def fallback(
    upstream: Upstream, url: str, environ: dict[str, str] | None = None, own: Fallback | None = None
) -> str:
    """Send a call as the fallback does: `ok`, or why not."""
    proxy = ReverseProxy(environ or {})
    headers = (("Authorization", f"Bearer {TOKEN}"),)
    call = ProxyRequest("POST", "/api/v1/x", headers, b"{}", Caller(TOKEN, 1), None, 0.0)
    try:
        base = fallback_url(Settings(fallback=Fallback(url=url)))
        reply = await proxy.send(base, (own or Fallback()).dialling(upstream), call, None, whole=False)
    except Unreachable as error:
        return str(error)
    finally:
        await proxy.close()
    return "ok" if reply.status == 204 else f"HTTP {reply.status}"


Way = Callable[..., Awaitable[str]]
BOTH = pytest.mark.parametrize("way", [link, fallback])


# --- trust ------------------------------------------------------------------------------------------------------------


@BOTH
async def test_trust_is_that_of_the_upstream(
    way: Way, authority: trustme.CA, ca_file: str, client_files: dict[str, str]
) -> None:
    async with tcp_server(Vendor().converse, ssl=serving(authority, client=True)) as port:
        url = f"https://127.0.0.1:{port}"
        assert await way(Upstream(ca_file=ca_file, **client_files), url) == "ok"
        assert "certificate" in await way(Upstream(**client_files), url)
        assert await way(Upstream(ca_file=ca_file), url) != "ok"
        assert await way(Upstream(insecure_skip_verify=True, **client_files), url) == "ok"


async def test_the_fallback_may_have_a_trust_of_its_own(authority: trustme.CA, ca_file: str, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    async with tcp_server(Vendor().converse, ssl=serving(authority)) as port:
        url = f"https://127.0.0.1:{port}"
        upstream = Upstream(ca_file=str(other), insecure_skip_verify=True)
        strict = Fallback(ca_file=ca_file, insecure_skip_verify=False)
        assert await fallback(upstream, url, own=strict) == "ok"
        assert "certificate" in await fallback(upstream, url, own=Fallback(insecure_skip_verify=False))
        assert await fallback(upstream, url) == "ok"


@pytest.mark.timeout(10)
@BOTH
async def test_a_file_that_is_no_file_is_told_at_once(way: Way, tmp_path: Path) -> None:
    fifo = tmp_path / "ca.pem"
    os.mkfifo(fifo)
    assert "upstream.ca_file: not a regular file" in await way(Upstream(ca_file=str(fifo)), "https://127.0.0.1:1")


async def test_files_that_cannot_be_used_are_told_by_their_keys(
    ca_file: str, client_files: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other.key"
    trustme.CA().issue_cert("agent-shim").private_key_pem.write_to_path(other)
    upstream = Upstream(**(client_files | {"client_key_file": str(other)}))
    said = await link(upstream, "https://127.0.0.1:1")
    assert "upstream.client_cert_file, upstream.client_key_file: no PEM certificate and key" in said
    assert "KEY_VALUES_MISMATCH" in said
    said = await fallback(
        Upstream(ca_file=ca_file), "https://127.0.0.1:1", own=Fallback(ca_file=str(tmp_path / "none"))
    )
    assert said == "fallback.ca_file: No such file or directory"


@BOTH
async def test_a_client_certificate_that_is_asked_for_and_missing_is_told(
    way: Way, authority: trustme.CA, ca_file: str
) -> None:
    """TLS 1.3 says so after the handshake; asyncio's servers never do, so this one is a thread."""
    context = serving(authority, client=True)

    def refuse(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(received, to_send, server_side=True)
        with connection:
            received.write(connection.recv(65536))
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            connection.sendall(to_send.read())
            connection.settimeout(0.3)  # the request is on its way with the rest of the handshake
            with suppress(TimeoutError):
                while data := connection.recv(65536):
                    received.write(data)
            with pytest.raises(ssl.SSLError):
                tls.do_handshake()
            connection.sendall(to_send.read())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = asyncio.create_task(asyncio.to_thread(refuse, listener))
        said = await way(Upstream(ca_file=ca_file), f"https://127.0.0.1:{listener.getsockname()[1]}")
        await server
    assert "CERTIFICATE_REQUIRED" in said


# --- names and addresses ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", ["vendor.test.", "VENDOR.test", "vendor.test"])
async def test_a_host_may_be_written_in_several_ways(way: Way, name: str, authority: trustme.CA, ca_file: str) -> None:
    """The certificate and the `Host` header have no final dot; the resolver, here the proxy, is given it."""
    vendor = Vendor()
    async with tcp_server(vendor.converse, ssl=serving(authority, "vendor.test")) as target:
        proxy = PickyProxy(target)
        async with tcp_server(proxy.converse) as port:
            upstream = Upstream(ca_file=ca_file, proxy=f"http://{PickyProxy.CREDENTIALS}@127.0.0.1:{port}")
            assert await way(upstream, f"https://{name}") == "ok"
    assert vendor.heads[0]["host"] == "vendor.test"
    assert proxy.heads == [f"CONNECT {name.lower()}:443 HTTP/1.1"]


@BOTH
async def test_a_name_in_another_alphabet(way: Way, authority: trustme.CA, ca_file: str) -> None:
    async with tcp_server(Vendor().converse, ssl=serving(authority, "xn--bcher-kva.test")) as target:
        proxy = PickyProxy(target)
        async with tcp_server(proxy.converse) as port:
            upstream = Upstream(ca_file=ca_file, proxy=f"http://{PickyProxy.CREDENTIALS}@127.0.0.1:{port}")
            assert await way(upstream, "https://Bücher.test:444") == "ok"
    assert proxy.heads == ["CONNECT xn--bcher-kva.test:444 HTTP/1.1"]


@BOTH
async def test_an_ipv6_literal(way: Way, authority: trustme.CA, ca_file: str) -> None:
    vendor, proxy = Vendor(), ForwardProxy()
    async with (
        tcp_server(vendor.converse, "::1", ssl=serving(authority, "::1")) as port,
        tcp_server(proxy.converse, "::1") as proxy_port,
    ):
        url = f"https://[::1]:{port}"
        assert await way(Upstream(ca_file=ca_file), url) == "ok"
        assert await way(Upstream(ca_file=ca_file, proxy=f"http://[::1]:{proxy_port}"), url) == "ok"
    assert [head.split("\r\n")[:2] for head in proxy.heads] == [
        [f"CONNECT [::1]:{port} HTTP/1.1", f"Host: [::1]:{port}"]
    ]


# --- proxies ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("secure", [False, True])
async def test_a_proxy_that_insists_on_credentials_and_on_host_with_its_port(
    way: Way, secure: bool, authority: trustme.CA, ca_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with tcp_server(Vendor().converse, ssl=serving(authority, "vendor.test")) as target:
        proxy = PickyProxy(target)
        options = {"ssl": serving(authority, "127.0.0.1")} if secure else {}
        async with tcp_server(proxy.converse, **options) as port:
            scheme = "https" if secure else "http"
            address = f"{scheme}://{PickyProxy.CREDENTIALS}@127.0.0.1:{port}"
            with caplog.at_level(logging.DEBUG):
                assert await way(Upstream(ca_file=ca_file, proxy=address), "https://Vendor.test") == "ok"
                environ = {"HTTPS_PROXY": address, "NO_PROXY": "other.test,10.0.0.0/8"}
                assert await way(Upstream(ca_file=ca_file), "https://vendor.test:8443", environ) == "ok"
                nobody = f"{scheme}://127.0.0.1:{port}"
                assert "HTTP 407" in await way(Upstream(ca_file=ca_file, proxy=nobody), "https://vendor.test")
    assert proxy.heads == [f"CONNECT vendor.test:{number} HTTP/1.1" for number in (443, 8443, 443)]
    assert f"through {nobody} (upstream.proxy)" in caplog.text
    assert f"through {nobody} (HTTPS_PROXY of the environment)" in caplog.text
    assert "pass w" not in caplog.text
    assert "pass%20w" not in caplog.text
    assert TOKEN not in caplog.text


@BOTH
async def test_a_plain_request_that_the_proxy_refuses_is_no_answer_of_the_vendor(way: Way) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers = await read_head(reader)
        assert line.split(" ")[1].startswith("http://vendor.test/"), "RFC 9110 knows no proxy request for ws://"
        assert headers["proxy-authorization"] == "Basic dTpw"
        writer.write(answer("407 Proxy Authentication Required", "Proxy-Authenticate: Basic"))

    async with tcp_server(refuse) as port:
        upstream = Upstream(proxy=f"http://u:p@127.0.0.1:{port}", allow_insecure=True)
        assert "the proxy answered HTTP 407" in await way(upstream, "http://vendor.test")


async def test_other_settings_count_from_the_next_call(authority: trustme.CA, ca_file: str) -> None:
    """The section is reloadable; replies that still come through the earlier connections are not cut."""
    call = ProxyRequest("POST", "/x", (), b"{}", Caller("", 1), None, 0.0)
    async with tcp_server(Vendor().converse, ssl=serving(authority)) as port:
        proxy, base = ReverseProxy({}), f"https://127.0.0.1:{port}"
        for own, fails in ((Fallback(), True), (Fallback(ca_file=ca_file), False), (Fallback(), True)):
            try:
                await proxy.send(base, own.dialling(Upstream()), call, None, whole=False)
                assert not fails
            except Unreachable:
                assert fails
        await proxy.close()


async def test_the_fallback_may_have_a_proxy_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    vendor, proxy = Vendor(), ForwardProxy()
    async with tcp_server(vendor.converse) as target, tcp_server(proxy.converse) as port:
        with caplog.at_level(logging.INFO):
            own = Fallback(proxy=f"http://127.0.0.1:{port}")
            assert await fallback(Upstream(proxy="http://127.0.0.1:1"), f"http://127.0.0.1:{target}", own=own) == "ok"
            assert await fallback(Upstream(), f"http://127.0.0.1:{target}") == "ok"
    assert len(proxy.heads) == 1
    assert "proxy" not in {name for name in vendor.heads[0] if name.startswith("proxy")}
    dialled = f"fallback http://127.0.0.1:{target} is dialled"
    assert f"{dialled} through http://127.0.0.1:{port} (fallback.proxy)" in caplog.text
    assert f"{dialled} direct" in caplog.text


@BOTH
@pytest.mark.parametrize("value", ["http://[::1", "http://:3128", "http://h:0", "http://h:x", "socks5://h:1"])
async def test_a_proxy_of_the_environment_that_cannot_be_used_is_told(way: Way, value: str) -> None:
    said = await way(Upstream(), "https://vendor.test", {"HTTPS_PROXY": value})
    assert "http://host:port" in said or "only http and https proxies" in said


@BOTH
async def test_a_proxy_may_answer_connect_with_a_length(way: Way, authority: trustme.CA, ca_file: str) -> None:
    """RFC 9110, 9.3.6: a successful answer to CONNECT has no body, whatever its headers say."""

    class Wordy(ForwardProxy):
        CONNECTED = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nVia: 1.1 wordy\r\n\r\n"

    async with (
        tcp_server(Vendor().converse, ssl=serving(authority)) as target,
        tcp_server(Wordy().converse) as port,
    ):
        upstream = Upstream(ca_file=ca_file, proxy=f"http://127.0.0.1:{port}")
        assert await way(upstream, f"https://127.0.0.1:{target}") == "ok"


@BOTH
async def test_no_proxy_decides_for_both_ways(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        environ = {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "192.0.2.0/24, .vendor.invalid"}
        hasty, patient = Upstream(connect_timeout_s=0.2), Upstream(connect_timeout_s=30)  # no resolver is waited for
        assert "proxy" not in await way(hasty, "http://api.vendor.invalid.", environ)
        assert "cannot reach the proxy" in await way(patient, "http://api.other.invalid", environ)
    assert "is dialled direct (NO_PROXY of the environment)" in caplog.text


# --- answers that libraries read otherwise ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "connection, outcome",
    [
        ("upgrade, keep-alive", "ok"),
        ("Keep-Alive,UPGRADE", "ok"),
        ("keep-alive\r\nconnection: Upgrade", "ok"),
        ("Upgrade\r\nConnection: Upgrade", "ok"),
        ("upgrades, x-upgrade", "handshake: Invalid connection header"),
    ],
)
async def test_connection_of_an_upgrade_is_a_list_of_tokens(connection: str, outcome: str) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer, connection=connection)
        await reader.read(1)

    async with tcp_server(accept) as port:
        assert await link(Upstream(), f"http://127.0.0.1:{port}") == outcome


@BOTH
@pytest.mark.timeout(20)
async def test_endless_interim_responses_end_the_call(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """Also from a proxy, which is asked by the same library."""

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        while not writer.transport.is_closing():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)
            await writer.drain()

    async with tcp_server(flood) as port:
        assert "too many interim responses" in await way(Upstream(), f"http://127.0.0.1:{port}")
        upstream = Upstream(proxy=f"http://127.0.0.1:{port}")
        assert "too many interim responses" in await way(upstream, "https://vendor.test")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@BOTH
async def test_a_few_interim_responses_are_normal(way: Way) -> None:
    vendor = Vendor()

    async def hints(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(MAX_INTERIM_RESPONSES):
            writer.write(EARLY_HINTS)
        await vendor.converse(reader, writer)

    async with tcp_server(hints) as port:
        assert await way(Upstream(), f"http://127.0.0.1:{port}") == "ok"


@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(answer("200 OK"), id="a response"),
        pytest.param(EARLY_HINTS, id="an interim response"),
        pytest.param(EARLY_HINTS * (MAX_INTERIM_RESPONSES + 1), id="many interim responses"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_what_comes_behind_an_answer_is_no_answer_to_the_next_call(behind: bytes, at_once: bool) -> None:
    """The next call on the connection may be another agent's."""
    proxy, read, sent, call = ReverseProxy({}), asyncio.Event(), asyncio.Event(), 0

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal call
        while await reader.read(1):
            await read_head(reader)
            call += 1
            reply = f"HTTP/1.1 20{call} OK\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            writer.write(reply + (behind if at_once else b""))
            await read.wait()
            writer.write(b"" if at_once else behind)
            sent.set()

    async def ask(port: int) -> int:
        call = ProxyRequest("GET", "/x", (), b"", Caller("", 1), None, 0.0)
        url = f"http://127.0.0.1:{port}"
        return (await proxy.send(url, Fallback().dialling(Upstream()), call, None, whole=False)).status

    async with tcp_server(converse) as port, tcp_server(Vendor().converse) as other:
        assert await ask(port) == 201
        read.set()
        async with asyncio.timeout(60):
            await sent.wait()
        assert await ask(other) == 204  # by then the bytes have been seen
        assert await ask(port) == 202
        await proxy.close()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_call_that_is_cut_is_not_sent_again(method: str) -> None:
    """A poll may have taken commands already; the agent decides what to do about a 502."""
    calls = 0

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await read_head(reader)

    async with tcp_server(cut) as port:
        proxy = ReverseProxy({})
        call = ProxyRequest(method, "/x", (), b"", Caller("", 1), None, 0.0)
        with pytest.raises(Unreachable, match="the connection was closed before an answer came"):
            await proxy.send(f"http://127.0.0.1:{port}", Fallback().dialling(Upstream()), call, None, whole=False)
        await proxy.close()
    assert calls == 1


@pytest.mark.parametrize(
    "reply, said",
    [
        (answer("101 Switching Protocols", "Upgrade: x", "Connection: upgrade"), "an upgrade that nobody asked for"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "no HTTP"),
        (answer("200 OK", *[f"X-{number}: 1" for number in range(200)]), "its head is too large"),
        (answer("200 OK", f"X: {'x' * 20_000}"), "its head is too large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "closed before the answer was complete"),
    ],
)
async def test_answers_that_no_agent_shall_get(reply: bytes, said: str) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(reply)

    async with tcp_server(converse) as port:
        assert said in await fallback(Upstream(), f"http://127.0.0.1:{port}")


async def test_the_fallback_drops_idle_connections_before_servers_do() -> None:
    """A call that crosses the server's close would be answered 502, and nobody may send it twice."""
    calls, dropped = 0, asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        while head := await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            calls += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            if calls == 2:
                assert await reader.read(1) == b""
                dropped.set()
                return

    async with tcp_server(converse) as port:
        proxy, dialling = ReverseProxy({}), Fallback().dialling(Upstream())
        call = ProxyRequest("POST", "/x", (), b"{}", Caller("", 1), None, 0.0)
        for _ in range(2):
            await proxy.send(f"http://127.0.0.1:{port}", dialling, call, None, whole=False)
        assert calls == 2, "both calls take one connection"
        async with asyncio.timeout(KEEP_S + 10):
            await dropped.wait()
        await proxy.close()


async def test_the_fallback_waits_for_no_100_continue() -> None:
    """The API may never say 100: the expectation was the agent's and is met by the shim."""
    vendor = Vendor()
    async with tcp_server(vendor.converse) as port:
        proxy = ReverseProxy({})
        headers = (("Expect", "100-continue"), ("Content-Encoding", "x-gzip"), ("Content-Length", "2"))
        call = ProxyRequest("POST", "/x", headers, b"{}", Caller("", 1), None, 0.0)
        reply = await proxy.send(f"http://127.0.0.1:{port}", Fallback().dialling(Upstream()), call, None, whole=False)
        await proxy.close()
    assert isinstance(reply, ProxyResponse)
    assert reply.status == 204
    assert "expect" not in vendor.heads[0]
    assert vendor.heads[0]["content-encoding"] == "x-gzip"


class Defective(AiohttpUpstream):
    """A dialler with a defect in each dial."""

    async def _connect(self, spec: DialRequest) -> DialFailure:
        raise ValueError("a defect")


async def test_a_defect_in_a_dial_is_answered_so_that_the_link_dials_again() -> None:
    tasks = Tasks()
    port = Defective(Upstream(), tasks.spawn, environ={})
    outcome = await dial(port, DialRequest("ws://127.0.0.1:1/ws", TOKEN), Events())
    assert isinstance(outcome, DialFailure)
    await port.close()
    with pytest.raises(ValueError, match="a defect"):  # for `App.spawn_isolated`, which logs and counts it
        await tasks.finish()
