"""doctor on a store in NATS JetStream, with real servers: what is looked at, and that nothing is changed by it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support import natsd
from tests.support.natsd import NatsServer, running
from tests.support.processes import Shim
from tests.support.sockets import tcp_server
from tests.support.stores import put
from tests.tools.doctor.conftest import Diagnosis, Doctor

pytestmark = pytest.mark.needs("nats-server")

NOWHERE = {"url": "http://127.0.0.1:9", "token": "canary-token"}
LINES = ["nats", "nats-tls", "nats-version", "payload", "nats-user", "jetstream", "replicas", "streams"]


async def examine(doctor: Doctor, url: str, **store: Any) -> Diagnosis:
    return await doctor.examine(store={"url": url, "replicas": 1, **store}, upstream=NOWHERE)


@contextmanager
def serving(folder: Path, extra: str = "") -> Iterator[NatsServer]:
    server = NatsServer(folder, extra)
    with running(server):
        yield server


def new_folder(folder: Path) -> Path:
    new = folder / "other"
    new.mkdir()
    return new


async def test_a_good_server_line_by_line_and_nothing_is_made(doctor: Doctor, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        found = await examine(doctor, server.url)
        assert [check for check in found.order if check in LINES] == LINES
        found.expect("nats", "PASS", "1 of 1 servers answer", f"127.0.0.1:{server.port} (2.")
        found.expect("nats-tls", "PASS", "loopback")
        found.expect("nats-user", "WARN", "no credentials", "an account of its own")
        found.expect("payload", "PASS", "1 MiB")
        found.expect("jetstream", "PASS", "no limit")
        found.expect("replicas", "PASS", "one copy")
        found.expect("streams", "PASS", "none yet")
        assert set(found.failing) <= {"tcp"}
        assert await asyncio.to_thread(natsd.streams, server.url) == {}
        client = natsd.client(server.url)
        await asyncio.to_thread(client.open)
        await asyncio.to_thread(client.close)
        found = await examine(doctor, server.url)
        found.expect("streams", "PASS", "5, all copies up to date")


async def test_nobody_is_there_or_something_else(doctor: Doctor, tmp_path: Path) -> None:
    async with tcp_server(lambda reader, writer: asyncio.sleep(0)) as gone:
        pass
    found = await examine(doctor, f"nats://127.0.0.1:{gone}")
    found.expect("nats", "FAIL", f"127.0.0.1:{gone}: Connection refused", "store.url")
    assert "nats-user" not in found.order

    async def chatter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()

    async with tcp_server(chatter) as port:
        with serving(tmp_path) as server:
            found = await examine(doctor, f"nats://127.0.0.1:{port}")
            found.expect("nats", "FAIL", "something else than a NATS server")
            found = await examine(doctor, f"{server.url},nats://127.0.0.1:{port}")
            found.expect("nats", "WARN", "1 of 2 servers answer", "something else")
            found.expect("jetstream", "PASS")


async def test_more_copies_than_servers(doctor: Doctor, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        found = await examine(doctor, server.url, replicas=3)
    found.expect("replicas", "FAIL", "store.replicas is 3, and 1 servers are known", "store.replicas: 1")


async def test_passwords_and_credentials_files(doctor: Doctor, tmp_path: Path) -> None:
    with serving(tmp_path, 'authorization {user: "shim", password: "canary-right"}\n') as server:
        found = await examine(doctor, server.url.replace("//", "//shim:canary-wrong@"))
        found.expect("nats-user", "FAIL", "refuses the credentials", "store.credentials_file")
        assert "jetstream" not in found.order
        found = await examine(doctor, server.url.replace("//", "//shim:canary-right@"))
        found.expect("nats-user", "PASS", "by store.url")
        found.expect("jetstream", "PASS")
    account = natsd.Account()
    file = tmp_path / "user.creds"
    with serving(new_folder(tmp_path), account.configuration) as server:
        found = await examine(doctor, server.url, credentials_file=str(file))
        found.expect("nats-user", "FAIL", "cannot be read", "readable")
        file.write_text(account.credentials())
        found = await examine(doctor, server.url, credentials_file=str(file))
        found.expect("nats-user", "PASS", "by store.credentials_file")


async def test_what_the_user_may_not_do(doctor: Doctor, tmp_path: Path) -> None:
    api = '"$JS.API.>", "_INBOX.>"'
    users = f"""{{user: little, password: p, permissions: {{publish: [{api}], subscribe: ["_INBOX.>"]}}}},
        {{user: whole, password: p, permissions: {{publish: [{api}, "agent-shim.>"], subscribe: ["_INBOX.>"]}}}},
        {{user: less, password: p, permissions: {{publish: ["other.>"], subscribe: ["_INBOX.>"]}}}}"""
    with serving(tmp_path, f"accounts {{A: {{jetstream: enabled, users: [{users}]}}}}\n") as server:
        found = await examine(doctor, server.url.replace("//", "//little:p@"))
        found.expect("nats-user", "FAIL", "not allowed: publish to agent-shim.doctor", "docs/scaling.md")
        whole = {"url": server.url.replace("//", "//whole:p@"), "replicas": 1}
        found = await doctor.examine(store=whole, upstream=NOWHERE, shards={"count": 3})
        found.expect("nats-user", "FAIL", "not allowed: publish to agent-shim-s2.doctor")
        found = await examine(doctor, server.url.replace("//", "//less:p@"))
        found.expect("nats-user", "FAIL", "not allowed: publish to $js.api.info")


async def test_what_the_account_has_of_jetstream(doctor: Doctor, tmp_path: Path) -> None:
    accounts = """accounts {
        NONE: {users: [{user: none, password: p}]}
        FEW: {jetstream: {max_streams: 2}, users: [{user: few, password: p}]}
        SMALL: {jetstream: {max_file: 10485760}, users: [{user: small, password: p}]}
        LARGE: {jetstream: {max_file: 1073741824}, users: [{user: large, password: p}]}
    }\n"""
    with serving(tmp_path, accounts) as server:
        for user, status, parts in (
            ("none", "FAIL", ("not enabled", "jetstream: enabled")),
            ("few", "FAIL", ("2 streams", "max_streams")),
            ("small", "WARN", ("0 MiB used of 10 MiB", "more disk")),
            ("large", "PASS", ("0 MiB used of 1024 MiB",)),
        ):
            found = await examine(doctor, server.url.replace("//", f"//{user}:p@"))
            found.expect("jetstream", status, *parts)


async def test_small_and_large_messages(doctor: Doctor, tmp_path: Path) -> None:
    with serving(tmp_path, "max_payload: 65536\n") as server:
        (await examine(doctor, server.url)).expect("payload", "WARN", "0.0625 MiB", "max_payload: 8MB")
        server.kill()
        server.start(extra="max_payload: 16777216\n")
        (await examine(doctor, server.url)).expect("payload", "WARN", "16 MiB", "8 MB")


async def test_tls(doctor: Doctor, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain, key, trusted = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(trusted)
    with serving(tmp_path, f'tls {{cert_file: "{chain}", key_file: "{key}"}}\n') as server:
        secure, ca = f"tls://localhost:{server.port}", str(trusted)
        found = await examine(doctor, secure, ca_file=ca)
        found.expect("nats-tls", "PASS", "TLSv1.3, trusted by", "trustme")
        found.expect("jetstream", "PASS")
        found = await examine(doctor, secure)
        found.expect("nats-tls", "FAIL", "store.ca_file")
        assert "nats-user" not in found.order
        found = await examine(doctor, f"tls://127.0.0.1:{server.port}", ca_file=ca)
        found.expect("nats-tls", "FAIL", "other names", "store.url must use one of them")
        found = await examine(doctor, secure, ca_file=str(tmp_path / "none.pem"))
        found.expect("nats-tls", "FAIL", "store.ca_file cannot be used")
        found = await examine(doctor, f"nats://localhost:{server.port}")
        found.expect("nats-tls", "WARN", "asks for TLS", "write tls://")
        server.kill()
        server.start(extra="")
        found = await examine(doctor, secure, ca_file=ca)
        found.expect("nats-tls", "FAIL", "has no TLS", "a tls block")


async def test_who_owns_the_shards(doctor: Doctor, tmp_path: Path) -> None:
    shards = {"count": 4, "lease_s": 2, "replica": "north"}

    async def lines() -> list[str]:
        _, text = await doctor.run("--json", store={"url": server.url, "replicas": 1}, upstream=NOWHERE, shards=shards)
        return [each["text"] for each in json.loads(text)["findings"] if each["check"] == "shards"]

    async def look(**wanted: Any) -> Diagnosis:
        store = {"url": server.url, "replicas": 1}
        return await doctor.examine(store=store, upstream=NOWHERE, shards={**shards, **wanted})

    with serving(tmp_path) as server:
        (await look()).expect("shards", "WARN", "4 shards, and no replica lives")
        client = natsd.client(server.url)
        await asyncio.to_thread(client.open)
        await asyncio.to_thread(client.one, put("1"))
        await asyncio.to_thread(client.close)
        config = {"store": {"url": server.url, "replicas": 1}, "upstream": NOWHERE, "shards": shards}
        async with Shim(new_folder(tmp_path), config) as shim:
            await shim.start()
            for number in range(4):
                await shim.event("shard_taken", shard=number)
            left = "agent-shim-commands has 1 commands of shards.count: 0, which nobody offers"
            assert await lines() == ["4, owned by north 4", left]
            (await look()).expect("streams", "PASS", "27, all copies up to date")
            (await look(count=8)).expect("shards", "FAIL", "agreed upon 4 and 2", "docs/operations.md")
            (await look(count=0)).expect("shards", "FAIL", "replicas with shards live here: north")
            await shim.kill()
        # Its leases end by themselves.
        while (await lines())[0] != "4 shards, and no replica lives":
            pass


@pytest.mark.timeout(150)
async def test_a_cluster_that_loses_one_server_and_then_another(doctor: Doctor, tmp_path: Path) -> None:
    servers = natsd.cluster(tmp_path)
    url = ",".join(server.url for server in servers)
    with running(*servers):
        client = natsd.client(url, replicas=3)
        await asyncio.to_thread(client.open)
        await asyncio.to_thread(client.close)
        found = await examine(doctor, url, replicas=3)
        found.expect("nats", "PASS", "3 of 3")
        found.expect("replicas", "PASS", "3 copies on 3 servers")
        found.expect("streams", "PASS", "5, all copies up to date")
        (await examine(doctor, url, replicas=1)).expect("replicas", "WARN", "store.replicas: 3")
        servers[0].kill()
        found = await examine(doctor, url, replicas=3)
        found.expect("nats", "WARN", "2 of 3")
        servers[1].kill()
        # A leader that is left alone notices it after some seconds.
        alone = await examine(doctor, url, replicas=3)
        while not {"jetstream", "streams"} & set(alone.failing):
            alone = await examine(doctor, url, replicas=3)
        alone.expect("nats", "WARN", "1 of 3")
        (check,) = {"jetstream", "streams"} & set(alone.failing)
        alone.expect(check, "FAIL", "more than half")
