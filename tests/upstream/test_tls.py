"""TLS and proxies of the upstream side, with real certificates and a real CONNECT proxy."""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from shim.config.settings import Upstream
from shim.ports import DialFailure, DialRequest
from shim.protocol.upstream_message import Message
from shim.upstream import AiohttpUpstream
from shim.upstream.dialler import choose_proxy
from tests.support.sockets import Events, Tasks, accept_websocket, answer, connect, read_head, refusal, tcp_server

TOKEN = "token-canary"


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or ("127.0.0.1",))).configure_cert(context)
    return context


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await accept_websocket(reader, writer)
    writer.write(b"\x81\x10" + b'{"type":"hello"}')
    await reader.read(1)


@asynccontextmanager
async def dialling(settings: Upstream, environ: dict[str, str] | None = None) -> AsyncIterator[AiohttpUpstream]:
    tasks = Tasks()
    upstream = AiohttpUpstream(settings, tasks.spawn, environ=environ or {})
    try:
        yield upstream
    finally:
        await upstream.close()
        await tasks.finish()


async def assert_greeted(upstream: AiohttpUpstream, url: str) -> None:
    events = Events()
    await connect(upstream, DialRequest(url, TOKEN), events)
    await events.until("message")
    assert events.messages == [Message("hello")]


async def test_a_certificate_of_the_given_authority_is_trusted(authority: trustme.CA, ca_file: str) -> None:
    async with (
        tcp_server(greet, ssl=server_context(authority)) as port,
        dialling(Upstream(ca_file=ca_file)) as upstream,
    ):
        await assert_greeted(upstream, f"wss://127.0.0.1:{port}/ws")


@pytest.mark.parametrize(
    "names,trusted,detail",
    [
        (("127.0.0.1",), False, "unable to get local issuer certificate"),
        (("other.example",), True, "IP address mismatch, certificate is not valid for '127.0.0.1'."),
    ],
)
async def test_other_certificates_are_refused(
    authority: trustme.CA, ca_file: str, names: tuple[str, ...], trusted: bool, detail: str
) -> None:
    settings = Upstream(ca_file=ca_file if trusted else "")
    async with tcp_server(greet, ssl=server_context(authority, *names)) as port, dialling(settings) as upstream:
        failure = await refusal(upstream, DialRequest(f"wss://127.0.0.1:{port}/ws", TOKEN))
    assert failure == DialFailure("tls", detail=detail)


async def test_skipping_verification_is_loud(authority: trustme.CA, caplog: pytest.LogCaptureFixture) -> None:
    context = server_context(authority, "other.example")
    async with tcp_server(greet, ssl=context) as port, dialling(Upstream(insecure_skip_verify=True)) as upstream:
        await assert_greeted(upstream, f"wss://127.0.0.1:{port}/ws")
        await assert_greeted(upstream, f"wss://127.0.0.1:{port}/ws")
    assert caplog.text.count("insecure_skip_verify") == 1


async def test_old_tls_is_refused(authority: trustme.CA, ca_file: str) -> None:
    context = server_context(authority)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with tcp_server(greet, ssl=context) as port, dialling(Upstream(ca_file=ca_file)) as upstream:
        failure = await refusal(upstream, DialRequest(f"wss://127.0.0.1:{port}/ws", TOKEN))
    assert failure.reason in ("tls", "tcp"), "an asyncio server resets the connection instead of sending an alert"


async def test_a_server_without_tls(ca_file: str) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer("400 Bad Request"))
        await reader.read()

    async with tcp_server(converse) as port, dialling(Upstream(ca_file=ca_file)) as upstream:
        failure = await refusal(upstream, DialRequest(f"wss://127.0.0.1:{port}/ws", TOKEN))
    assert failure.reason == "tls"


async def test_a_client_certificate_is_shown(authority: trustme.CA, ca_file: str, tmp_path: Path) -> None:
    client = authority.issue_cert("agent-shim")
    client.private_key_pem.write_to_path(tmp_path / "key.pem")
    client.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = server_context(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    settings = Upstream(
        ca_file=ca_file, client_cert_file=str(tmp_path / "cert.pem"), client_key_file=str(tmp_path / "key.pem")
    )
    async with tcp_server(greet, ssl=context) as port, dialling(settings) as upstream:
        await assert_greeted(upstream, f"wss://127.0.0.1:{port}/ws")


async def test_an_authority_that_changes_on_disk_counts_from_the_next_dial(
    authority: trustme.CA, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    settings = Upstream(ca_file=str(path))
    async with tcp_server(greet, ssl=server_context(authority)) as port, dialling(settings) as upstream:
        spec = DialRequest(f"wss://127.0.0.1:{port}/ws", TOKEN)
        assert (await refusal(upstream, spec)).detail == "upstream.ca_file: No such file or directory"
        path.write_text("not a certificate")
        assert (await refusal(upstream, spec)).detail == (
            "upstream.ca_file: no PEM file of certificates (NO_CERTIFICATE_OR_CRL_FOUND)"
        )
        authority.cert_pem.write_to_path(path)
        await assert_greeted(upstream, spec.url)


# --- proxies -------------------------------------------------------------------------------------------------------


class Proxy:
    """A CONNECT proxy that leads every name to one port; it may demand `user:pass word` or refuse."""

    def __init__(self, target: int, status: str = "200 Connection established") -> None:
        self.target, self.status = target, status
        self.seen: list[tuple[str, dict[str, str]]] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(await read_head(reader))
        writer.write(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
        if not self.status.startswith("200"):
            return
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, back))
                group.create_task(self._copy(there, writer))
        finally:
            back.transport.abort()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
        sink.close()


@pytest.mark.parametrize("by_environment", [False, True])
async def test_a_proxy_with_credentials(
    authority: trustme.CA, ca_file: str, by_environment: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with tcp_server(greet, ssl=server_context(authority, "controller.test")) as target:
        proxy = Proxy(target)
        async with tcp_server(proxy.converse) as port:
            way = f"http://user:pass%20word@127.0.0.1:{port}"
            settings = Upstream(ca_file=ca_file, proxy="" if by_environment else way)
            environ = {"HTTPS_PROXY": way} if by_environment else {}
            with caplog.at_level(logging.DEBUG):
                async with dialling(settings, environ) as upstream:
                    await assert_greeted(upstream, "wss://controller.test:8443/ws")
    line, headers = proxy.seen[0]
    assert line == "CONNECT controller.test:8443 HTTP/1.1"
    assert headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:pass word").decode()
    assert "authorization" not in headers, "the token is for the controller"
    source = "HTTPS_PROXY of the environment" if by_environment else "upstream.proxy"
    expected = f"upstream wss://controller.test:8443 is dialled through http://127.0.0.1:{port} ({source})"
    assert expected in caplog.text
    assert "pass" not in caplog.text
    assert TOKEN not in caplog.text


async def test_a_proxy_that_refuses_is_no_refusal_of_the_controller() -> None:
    proxy = Proxy(0, "407 Proxy Authentication Required")
    async with tcp_server(proxy.converse) as port, dialling(Upstream(proxy=f"http://127.0.0.1:{port}")) as upstream:
        failure = await refusal(upstream, DialRequest("wss://controller.test/ws", TOKEN, in_query=True))
    assert failure == DialFailure("proxy", detail="the proxy answered HTTP 407")


async def test_a_proxy_that_is_not_there() -> None:
    async with tcp_server(greet) as port:
        pass
    async with dialling(Upstream(proxy=f"http://127.0.0.1:{port}")) as upstream:
        failure = await refusal(upstream, DialRequest("wss://controller.test/ws", TOKEN))
    assert failure == DialFailure("proxy", detail="cannot reach the proxy: Connection refused")


async def test_a_proxy_of_a_kind_that_is_not_spoken() -> None:
    async with dialling(Upstream(proxy="socks5://127.0.0.1:1")) as upstream:
        failure = await refusal(upstream, DialRequest("wss://controller.test/ws", TOKEN))
    assert failure == DialFailure("proxy", detail="only http and https proxies are supported")


@pytest.mark.parametrize(
    "url,environ,expected",
    [
        ("wss://h.example/ws", {}, ""),
        ("wss://h.example/ws", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("wss://h.example/ws", {"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:1"}, "http://low:1"),
        ("wss://h.example/ws", {"HTTP_PROXY": "http://p:1"}, ""),
        ("ws://h.example/ws", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("wss://h.example/ws", {"ALL_PROXY": "p:1"}, "http://p:1"),
        ("ws://127.0.0.1:1/ws", {"HTTP_PROXY": "http://p:1"}, ""),
        ("ws://localhost/ws", {"HTTP_PROXY": "http://p:1"}, ""),
        ("ws://localhost./ws", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("ws://a.localhost/ws", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
    ],
)
def test_the_proxy_of_the_environment(url: str, environ: dict[str, str], expected: str) -> None:
    assert choose_proxy(url, Upstream().dialling, environ).url == expected


@pytest.mark.parametrize(
    "url,no_proxy,direct",
    [
        ("wss://h.example/ws", "*", True),
        ("wss://h.example/ws", "h.example", True),
        ("wss://a.h.example/ws", "H.Example", True),
        ("wss://a.h.example/ws", ".h.example, other", True),
        ("wss://a.h.example/ws", "*.h.example", True),
        ("wss://ah.example/ws", "h.example", False),
        ("wss://h.example/ws", "h.example:443", True),
        ("wss://h.example:8443/ws", "h.example:443", False),
        ("wss://10.1.2.3/ws", "10.0.0.0/8", True),
        ("wss://11.1.2.3/ws", "10.0.0.0/8", False),
        ("wss://h.example/ws", "10.0.0.0/8,,bad/99", False),
        ("wss://[fd00::1]/ws", "fd00::/8", True),
        ("wss://[fd00::1]/ws", "fd00::1", True),
        ("wss://[fd00::1]:9/ws", "[fd00::1]:9", True),
        ("wss://[fd00:0::1]/ws", "fd00::0:1", True),
        ("wss://h.example./ws", "h.example", True),
        ("wss://h.example/ws", "H.example.", True),
        ("wss://bücher.example/ws", "xn--bcher-kva.example", True),
        ("https://h.example/api", ".example", True),
        ("wss://h.example/ws", ".", False),
    ],
)
def test_exceptions_from_the_proxy(url: str, no_proxy: str, direct: bool) -> None:
    environ = {"HTTPS_PROXY": "http://p:1", "NO_PROXY": no_proxy}
    assert choose_proxy(url, Upstream().dialling, environ).url == ("" if direct else "http://p:1")
