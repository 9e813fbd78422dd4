"""A NATS server's first line, and TLS after it: what can be known of each server before anybody logs in."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from shim.settings import Store, is_loopback
from shim.tools.doctor.certificates import certificate, reason, trust
from shim.tools.doctor.findings import Finding, Status, failed, passed, warned

PORT = 4222
TIMEOUT_S = 3.0
_WORST = (Status.FAIL, Status.WARN, Status.PASS)


@dataclass(frozen=True, slots=True)
class Greeting:
    """One server of `store.url`: what its INFO says, or why there is none; `tls` where a handshake was tried."""

    url: str = field(repr=False)
    where: str
    info: dict[str, Any] = field(default_factory=dict)
    trouble: str = ""
    tls: Finding | None = None


async def greet(store: Store) -> Sequence[Greeting]:
    """Ask all servers at once."""
    return await asyncio.gather(*(_greet(url.strip(), store.ca_file) for url in store.url.split(",")))


async def _greet(url: str, ca_file: str) -> Greeting:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or PORT
    where = f"{host}:{port}"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            line = await reader.readline()
            info = json.loads(line.removeprefix(b"INFO ")) if line.startswith(b"INFO ") else {}
        if not info.get("server_id"):
            return Greeting(url, where, trouble="something else than a NATS server answers")
        return Greeting(
            url, where, info, tls=await _protect(writer, host, info, secure=parts.scheme == "tls", ca=ca_file)
        )
    except (OSError, ValueError) as error:  # TimeoutError is one
        why = "something else than a NATS server answers" if isinstance(error, ValueError) else reason(error)
        return Greeting(url, where, trouble=why)
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()


async def _protect(writer: asyncio.StreamWriter, host: str, info: dict[str, Any], *, secure: bool, ca: str) -> Finding:
    """What protects the connection."""
    offered = bool(info.get("tls_required") or info.get("tls_available"))
    if not secure:
        if info.get("tls_required"):
            return warned("nats-tls", f"{host} asks for TLS", "write tls:// in store.url: then nothing is sent without")
        if is_loopback(host):
            return passed("nats-tls", "none: loopback")
        return warned("nats-tls", f"{host}: none", "tls:// in store.url: commands and passwords can be read on the way")
    if not offered:
        todo = "give the server a tls block with a certificate; without one tls:// in store.url is refused"
        return failed("nats-tls", f"{host} has no TLS, store.url asks for it", todo)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except OSError as error:
        return failed(
            "nats-tls", f"store.ca_file cannot be used: {reason(error)}", "a readable PEM file of authorities"
        )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await writer.start_tls(context, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        return failed("nats-tls", f"{host}: {error.verify_message}", trust(error, host, "store.url", "store.ca_file"))
    except (ssl.SSLError, OSError) as error:
        return failed("nats-tls", f"{host}: {reason(error)}", "does the server ask for a client's certificate?")
    return certificate("nats-tls", writer.get_extra_info("ssl_object"), ca)


def judge(greetings: Sequence[Greeting]) -> list[Finding]:
    """Who answers, and how the connection is protected: one line each, the worst of all servers."""
    there = [each for each in greetings if each.info]
    away = [f"{each.where}: {each.trouble}" for each in greetings if not each.info]
    versions = ", ".join(f"{each.where} ({each.info.get('version', '?')})" for each in there)
    todo = "are the servers up, are names and ports in store.url right, does a firewall stand between?"
    if not there:
        return [failed("nats", f"no server answers: {'; '.join(away)}", todo)]
    text = f"{len(there)} of {len(greetings)} servers answer: {versions}"
    reach = warned("nats", f"{text}; {'; '.join(away)}", todo) if away else passed("nats", text)
    found = [each.tls for each in there if each.tls is not None]
    return [reach, min(found, key=lambda each: _WORST.index(each.status))]
