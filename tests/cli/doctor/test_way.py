"""doctor on the way to the controller: name, TCP, TLS, proxies, upgrade, token, frames, clock."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import trustme

from devtools.controller.history import EventKind
from devtools.controller.server import DevController
from devtools.controller.state import Options, TokenPlace
from tests.cli.doctor.conftest import PASSWORD, TOKEN, Doctor, upstream
from tests.support.proxies import ForwardProxy, PickyProxy, forward_proxy
from tests.support.sockets import accept_websocket, answer, read_head, tcp_server

WAY = ["proxy", "dns", "tcp", "tls", "upgrade", "token", "frames", "clock"]


async def test_a_good_way_is_walked_to_its_end_and_nothing_is_registered(doctor: Doctor) -> None:
    async with DevController([TOKEN]) as controller:
        found = await doctor.examine(upstream=upstream(controller.url))
        for check in WAY:
            found.expect(check, "PASS")
        assert found.failing == []
        assert found.code == 0
        closed = await controller.wait_for(lambda event: event.kind is EventKind.CLOSED)
        assert (closed.detail["by"], closed.detail["code"]) == ("agent", 1000)
        assert EventKind.RECEIVED not in {event.kind for event in controller.history.after(0)}


async def test_for_a_person(doctor: Doctor) -> None:
    async with DevController([TOKEN]) as controller:
        code, text = await doctor.run(upstream=upstream(controller.url))
    assert code == 0
    lines = text.splitlines()
    assert all(line.startswith(("PASS  ", "WARN  ", "      ")) for line in lines)
    assert any(line.startswith("      ") and " -> " in line for line in lines)
    assert TOKEN not in text


async def test_nobody_listens(doctor: Doctor) -> None:
    async with tcp_server(lambda r, w: asyncio.sleep(0)) as port:
        pass
    found = await doctor.examine(upstream=upstream(f"http://127.0.0.1:{port}"))
    found.expect("tcp", "FAIL", "Connection refused", "firewall")
    assert found.failing == ["tcp"]
    assert found.code == 1


async def test_a_name_that_does_not_exist(doctor: Doctor) -> None:
    found = await doctor.examine(upstream=upstream("https://controller.invalid"))
    found.expect("dns", "FAIL", "controller.invalid", "upstream.url", "DNS")
    assert found.failing == ["dns"]


# --- TLS --------------------------------------------------------------------------------------------------------------


def serving(authority: trustme.CA, *names: str, expires_in: timedelta = timedelta(days=90)) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, not_after=datetime.now(UTC) + expires_in).configure_cert(context)
    return context


async def refuse_with_time(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_head(reader)
    writer.write(answer("401 Unauthorized", f"Date: {format_datetime(datetime.now(UTC), usegmt=True)}"))


async def test_a_private_authority(doctor: Doctor, authority: trustme.CA, ca_file: str) -> None:
    async with tcp_server(refuse_with_time, ssl=serving(authority, "127.0.0.1")) as port:
        trusted = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}", ca_file=ca_file))
        trusted.expect("tls", "PASS", "TLSv1.3", ca_file, "trustme", "days")
        not_trusted = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}"))
        not_trusted.expect("tls", "FAIL", "local issuer", "upstream.ca_file")
        not_trusted.expect("clock", "PASS")
        unread = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}", ca_file=str(doctor.path)))
        unread.expect("tls", "FAIL", "no PEM file of certificates", "upstream.ca_file")
        loud = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}", insecure_skip_verify=True))
        loud.expect("tls", "WARN", "not checked", "remove upstream.insecure_skip_verify")


async def test_a_certificate_that_vouches_for_itself(doctor: Doctor, authority: trustme.CA) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(str(doctor.folder / "own.pem"))
    authority.private_key_pem.write_to_path(str(doctor.folder / "own.key"))
    context.load_cert_chain(doctor.folder / "own.pem", doctor.folder / "own.key")
    async with tcp_server(refuse_with_time, ssl=context) as port:
        found = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}"))
    found.expect("tls", "FAIL", "self", "upstream.ca_file")


@pytest.mark.parametrize(
    "names, expires_in, status, part",
    [
        (("other.test",), timedelta(days=90), "FAIL", "other names"),
        (("127.0.0.1",), timedelta(seconds=-60), "FAIL", "renewed"),
        (("127.0.0.1",), timedelta(days=3), "WARN", "renewed"),
    ],
)
async def test_certificates_that_are_wrong_or_old(
    names: tuple[str, ...],
    expires_in: timedelta,
    status: str,
    part: str,
    doctor: Doctor,
    authority: trustme.CA,
    ca_file: str,
) -> None:
    async with tcp_server(refuse_with_time, ssl=serving(authority, *names, expires_in=expires_in)) as port:
        found = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}", ca_file=ca_file))
    found.expect("tls", status, part)
    found.expect("clock", "PASS")


async def test_a_port_without_tls(doctor: Doctor) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer("400 Bad Request"))

    async with tcp_server(plain) as port:
        found = await doctor.examine(upstream=upstream(f"https://127.0.0.1:{port}"))
    found.expect("tls", "FAIL", "speak TLS")


# --- proxies ----------------------------------------------------------------------------------------------------------


async def test_a_proxy_that_strips_the_upgrade_is_named(doctor: Doctor) -> None:
    async with DevController([TOKEN]) as controller, forward_proxy(ForwardProxy(strips_upgrade=True)) as proxy:
        found = await doctor.examine(upstream=upstream(controller.url, proxy=f"http://u:{PASSWORD}@{proxy}"))
    found.expect("proxy", "PASS", proxy, "upstream.proxy")
    found.expect("upgrade", "FAIL", "stripped on the way", "1.1 office-proxy (via)", "Upgrade")
    found.expect("token", "WARN", "not examined")


async def test_a_proxy_that_passes_the_handshake_and_nothing_else(doctor: Doctor) -> None:
    async with DevController([TOKEN]) as controller, forward_proxy(ForwardProxy(swallows_frames=True)) as proxy:
        found = await doctor.examine(upstream=upstream(controller.url, proxy=f"http://{proxy}", connect_timeout_s=5))
    found.expect("upgrade", "PASS")
    found.expect("frames", "FAIL", "did not come back", "proxies")


async def test_a_good_proxy_of_the_environment(doctor: Doctor, authority: trustme.CA, ca_file: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        _, second = await reader.readexactly(2)
        mask = await reader.readexactly(4)
        payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(await reader.readexactly(second & 0x7F)))
        writer.write(b"\x81\x05hello" + bytes((0x8A, len(payload))) + payload)  # something else comes first
        await reader.read(100)

    passed = ForwardProxy()
    async with (
        tcp_server(talk, ssl=serving(authority, "localhost.example", "127.0.0.1")) as port,
        forward_proxy(passed) as proxy,
    ):
        doctor.environment = {"HTTPS_PROXY": f"http://u:{PASSWORD}@{proxy}", "NO_PROXY": ""}
        # loopback is never proxied for the environment's sake, so the proxy is named in the configuration as well
        found = await doctor.examine(
            upstream=upstream(f"https://127.0.0.1:{port}", ca_file=ca_file, proxy=f"http://u:{PASSWORD}@{proxy}")
        )
    found.expect("dns", "PASS", "127.0.0.1 is an address")
    found.expect("tls", "PASS")
    found.expect("frames", "PASS")
    assert passed.heads[0].startswith(f"CONNECT 127.0.0.1:{port} HTTP/1.1")


@pytest.mark.parametrize(
    "status, part",
    [("407 Proxy Authentication Required", "other credentials"), ("403 Forbidden", "allow CONNECT")],
)
async def test_a_proxy_that_refuses(status: str, part: str, doctor: Doctor) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(answer(status))

    async with tcp_server(refuse) as port:
        found = await doctor.examine(
            upstream=upstream("https://controller.test", proxy=f"http://u:{PASSWORD}@127.0.0.1:{port}")
        )
    found.expect("proxy", "FAIL", f"HTTP {status[:3]}", part)


@pytest.mark.parametrize(
    "reply, hangs, part",
    [
        (b"", True, "nothing behind it, wss://controller.test: no answer in time"),
        (b"", False, "does not answer CONNECT"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", False, "does not answer CONNECT"),
        (answer("200 OK"), True, "nothing behind it, wss://controller.test: no answer in time"),
        (answer("200 OK"), False, "nothing behind it, wss://controller.test: "),
    ],
)
async def test_a_proxy_behind_which_the_way_ends(reply: bytes, hangs: bool, part: str, doctor: Doctor) -> None:
    """The port of the proxy is open, so that no firewall on the way to it is to blame."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(reply)
        if hangs:
            await reader.read()
            await reader.read()

    async with tcp_server(converse) as port:
        found = await doctor.examine(
            upstream=upstream("https://controller.test", proxy=f"http://127.0.0.1:{port}", connect_timeout_s=1)
        )
    found.expect("tcp", "PASS", "(the proxy) answers")
    found.expect("proxy", "FAIL", part)


async def test_a_proxy_that_is_not_there(doctor: Doctor) -> None:
    async with tcp_server(lambda r, w: asyncio.sleep(0)) as port:
        pass
    found = await doctor.examine(upstream=upstream("https://controller.test", proxy=f"http://127.0.0.1:{port}"))
    found.expect("tcp", "FAIL", "(the proxy)")
    odd = await doctor.examine(upstream=upstream("https://controller.test", proxy="socks5://127.0.0.1:1"))
    odd.expect("config", "FAIL", "upstream.proxy")


# --- what the endpoint says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, parts",
    [
        (answer("426 Upgrade Required", "Server: nginx/1.2"), ("stripped", "nginx/1.2 (server)")),
        (answer("200 OK"), ("stripped",)),
        (answer("302 Found", "Location: https://elsewhere.test/?token=x"), ("redirected", "upstream.url")),
        (answer("404 Not Found"), ("no such path", "upstream.path")),
        (answer("503 Service Unavailable", "Retry-After: 3"), ("503", "goes on trying")),
        (answer("101 Switching Protocols", "Upgrade: websocket", "Sec-WebSocket-Accept: x"), ("not a WebSocket's",)),
        (b"", ("without an answer",)),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ("not a WebSocket's",)),
    ],
)
async def test_answers_that_are_no_upgrade(response: bytes, parts: tuple[str, ...], doctor: Doctor) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(response)

    async with tcp_server(converse) as port:
        found = await doctor.examine(upstream=upstream(f"http://127.0.0.1:{port}"))
    found.expect("upgrade", "FAIL", *parts)
    found.expect("token", "WARN", "not examined")
    assert "elsewhere" not in str(found.findings)


@pytest.mark.parametrize("auth, tried", [("auto", "header (401) and query (401)"), ("query", "query (401)")])
async def test_a_wrong_token_is_refused_by_every_way(auth: str, tried: str, doctor: Doctor) -> None:
    async with DevController(["another"]) as controller:
        found = await doctor.examine(upstream=upstream(controller.url, auth=auth))
    found.expect("upgrade", "PASS", "asks for a token first")
    found.expect("token", "FAIL", tried, "upstream.token_file")


async def test_a_token_that_is_taken_in_the_query_only(doctor: Doctor) -> None:
    async with DevController([TOKEN], options=Options(token_place=TokenPlace.QUERY)) as controller:
        found = await doctor.examine(upstream=upstream(controller.url))
        found.expect("token", "PASS", "accepted (sent in the query)")
        forced = await doctor.examine(upstream=upstream(controller.url, auth="header"))
        forced.expect("token", "FAIL", "header (401)")


async def test_a_token_file_that_cannot_be_read(doctor: Doctor) -> None:
    found = await doctor.examine(upstream={"url": "http://127.0.0.1:1", "token_file": str(doctor.folder / "none")})
    found.expect("token", "FAIL", "upstream.token_file", "readable")
    found.expect("tcp", "FAIL", "127.0.0.1:1")  # two things can be wrong at a time


async def test_agents_own_tokens(doctor: Doctor) -> None:
    async with DevController([TOKEN]) as controller:
        found = await doctor.examine(upstream={"url": controller.url})
        found.expect("token", "PASS", "each agent brings its own", "--token-file")
        given = doctor.folder / "token"
        given.write_text(TOKEN)
        found = await doctor.examine("--token-file", str(given), upstream={"url": controller.url})
        found.expect("token", "PASS", "accepted")
        given.write_text("canary-token-that-is-refused")
        found = await doctor.examine("--token-file", str(given), upstream={"url": controller.url})
        found.expect("token", "FAIL")


@pytest.mark.parametrize("skew_s, status", [(0, "PASS"), (90, "WARN"), (-4000, "FAIL")])
async def test_a_clock_that_is_wrong(skew_s: int, status: str, doctor: Doctor) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        there = datetime.now(UTC) + timedelta(seconds=skew_s)
        writer.write(answer("401 Unauthorized", f"Date: {format_datetime(there, usegmt=True)}"))

    async with tcp_server(converse) as port:
        found = await doctor.examine(upstream=upstream(f"http://127.0.0.1:{port}"))
    found.expect("clock", status, "agrees" if not skew_s else "behind" if skew_s > 0 else "ahead")


async def test_the_way_back(doctor: Doctor) -> None:
    async with DevController([TOKEN]) as controller:
        way = upstream(controller.url)
        good = await doctor.examine(upstream=way, fallback={"url": controller.url})
        good.expect("fallback", "PASS", "answers")
        async with tcp_server(lambda r, w: asyncio.sleep(0)) as port:
            pass
        bad_url = f"http://127.0.0.1:{port}"
        bad = await doctor.examine(upstream=way, fallback={"url": bad_url})
        bad.expect("fallback", "FAIL", "refused")
        ended = await doctor.examine(mode="http", upstream=way, fallback={"url": bad_url}, sunset={"at": "2026-01-31"})
        ended.expect("fallback", "PASS", "not asked")
        ended.expect("config", "PASS", "mode http, which is as websocket")

        async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(answer("410 Gone"))

        async with tcp_server(gone) as port:
            over = await doctor.examine(upstream=way, fallback={"url": f"http://127.0.0.1:{port}"})
        over.expect("fallback", "WARN", "no way back")


@pytest.mark.parametrize("status", ["403 Forbidden", "405 Method Not Allowed", "501 Not Implemented"])
async def test_a_server_that_refuses_head_is_a_way_back(status: str, doctor: Doctor) -> None:
    """Agents use GET and POST."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _ = await read_head(reader)
        writer.write(answer(status if line.startswith("HEAD ") else "200 OK", "Server: vendor-api"))

    async with tcp_server(converse) as port:
        url = f"http://127.0.0.1:{port}"
        found = await doctor.examine(upstream=upstream(url), fallback={"url": url})
    found.expect("fallback", "PASS", "answers (HTTP 200)", "the answer comes from vendor-api (server)")


async def test_the_way_back_is_the_one_that_the_shim_takes(doctor: Doctor, authority: trustme.CA, ca_file: str) -> None:
    """Trust, proxy and address are the upstream's where the fallback has none of its own."""

    async def fine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(answer("200 OK"))

    other = doctor.folder / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with tcp_server(fine, ssl=serving(authority, "vendor.test")) as port:
        proxy = PickyProxy(port)
        async with tcp_server(proxy.converse) as proxy_port:
            way = {
                "url": "wss://vendor.test./api/v1/clusters/agent/ws",
                "ca_file": ca_file,
                "proxy": f"http://{PickyProxy.CREDENTIALS}@127.0.0.1:{proxy_port}",
            }
            good = await doctor.examine(mode="http", upstream=way)
            good.expect("tls", "PASS")
            good.expect("fallback", "PASS", "vendor.test answers (HTTP 200)", f"through http://127.0.0.1:{proxy_port}")
            bad = await doctor.examine(mode="auto", upstream=way, fallback={"ca_file": str(other)})
            bad.expect("fallback", "FAIL", "tls", "fallback.ca_file")
            bad = await doctor.examine(mode="auto", upstream={**way, "ca_file": str(other)})
            bad.expect("fallback", "FAIL", "tls", "upstream.ca_file")
            bad = await doctor.examine(mode="auto", upstream=way, fallback={"proxy": f"http://127.0.0.1:{proxy_port}"})
            bad.expect("fallback", "FAIL", "proxy: the proxy answered HTTP 407", "fallback.proxy")
    assert set(proxy.heads) == {"CONNECT vendor.test.:443 HTTP/1.1"}


@pytest.mark.parametrize("lines, status", [("keep-alive, Upgrade", "PASS"), ("close", "FAIL")])
async def test_doctor_takes_for_an_upgrade_what_the_shim_does(lines: str, status: str, doctor: Doctor) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer, connection=lines)
        await reader.read(1)

    async with tcp_server(accept) as port:
        found = await doctor.examine(upstream=upstream(f"http://127.0.0.1:{port}", connect_timeout_s=5))
    found.expect("upgrade", status)


async def test_all_faults_of_a_configuration(doctor: Doctor) -> None:
    code, text = await doctor.run(poll={"hold": "sometimes"}, listen={"port": -1})
    assert code == 1
    assert "poll.hold" in text
    assert "listen.port" in text


@pytest.mark.parametrize(
    "code, reason, check, words",
    [
        (4401, f"invalid token {TOKEN}", "token", ("closed 4401", "invalid token ***", "upstream.token_file")),
        (1008, "", "token", ("closed 1008",)),
        (1013, "busy", "frames", ("closed 1013", "busy")),
    ],
)
async def test_a_controller_that_closes_behind_the_handshake_is_quoted(
    doctor: Doctor, code: int, reason: str, check: str, words: tuple[str, ...]
) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        payload = code.to_bytes(2, "big") + reason.encode()
        writer.write(b"\x88" + bytes([len(payload)]) + payload)
        await reader.read()

    async with tcp_server(converse) as port:
        found = await doctor.examine(upstream=upstream(f"http://127.0.0.1:{port}"))
    found.expect(check, "FAIL", *words)
