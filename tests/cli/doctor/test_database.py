"""doctor on a store in PostgreSQL: what it says of real servers, and that it leaves them as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from shim.config import settings
from shim.store.postgres.database import prepare
from tests.cli.doctor.conftest import Doctor
from tests.support.postgres import Postgres, query, running

pytestmark = pytest.mark.needs("postgresql")

NOWHERE = {"url": "http://127.0.0.1:9", "token": "canary-token"}
STRANGER = "canary-password-of-a-stranger"


def stranger(url: str, name: str) -> str:
    """Make a user without rights and return its URL of the same database."""
    query(url, f"CREATE ROLE {name} LOGIN PASSWORD '{STRANGER}'")
    return url.replace("shim:database-hunter2@", f"{name}:{STRANGER}@")


async def test_an_empty_database_is_good_and_stays_empty(doctor: Doctor, pg_url: str) -> None:
    found = await doctor.examine(store={"url": pg_url}, upstream=NOWHERE)
    found.expect("store", "PASS", "127.0.0.1", "without TLS")
    found.expect("database", "PASS", "PostgreSQL", "no schema yet")
    found.expect("rights", "PASS")
    found.expect("commit", "PASS", "ms")
    found.expect("replication", "PASS", "no standby")
    assert query(pg_url, "SELECT to_regnamespace('agent_shim')") == [(None,)]
    assert "space" not in found.findings, "the file of store.path is not used"


async def test_a_database_in_use(doctor: Doctor, pg_url: str) -> None:
    prepare(settings.Store(url=pg_url))
    found = await doctor.examine(store={"url": pg_url}, upstream=NOWHERE)
    found.expect("database", "PASS", "schema version")
    found.expect("rights", "PASS")


async def test_no_way_no_password_and_no_database(doctor: Doctor, pg_url: str) -> None:
    wrong = pg_url.replace("database-hunter2", "canary-wrong")
    found = await doctor.examine(store={"url": wrong}, upstream=NOWHERE)
    found.expect("store", "FAIL", "refuses the password", "store.password_file")
    found = await doctor.examine(store={"url": "postgresql://shim:canary@127.0.0.1:9/shim"}, upstream=NOWHERE)
    found.expect("store", "FAIL", "no connection")
    nowhere = pg_url.replace("/db_", "/no_such_")
    found = await doctor.examine(store={"url": nowhere}, upstream=NOWHERE)
    found.expect("store", "FAIL", "no such database")
    assert found.code == 1


async def test_a_password_file_that_is_missing(doctor: Doctor, pg_url: str) -> None:
    missing = str(doctor.folder / "nothing")
    found = await doctor.examine(store={"url": pg_url, "password_file": missing}, upstream=NOWHERE)
    found.expect("store", "FAIL", "store.password_file")


async def test_a_user_without_rights(doctor: Doctor, pg_url: str) -> None:
    url = stranger(pg_url, "stranger_before")
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("rights", "FAIL", "GRANT CREATE ON DATABASE")
    prepare(settings.Store(url=pg_url))
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("rights", "FAIL", "agent_shim")
    query(pg_url, "GRANT USAGE ON SCHEMA agent_shim TO stranger_before")
    query(pg_url, "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA agent_shim TO stranger_before")
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("rights", "FAIL")
    query(pg_url, "GRANT DELETE ON ALL TABLES IN SCHEMA agent_shim TO stranger_before")
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("rights", "PASS")


async def test_another_applications_schema(doctor: Doctor, pg_url: str) -> None:
    query(pg_url, "CREATE SCHEMA agent_shim")
    query(pg_url, "CREATE TABLE agent_shim.meta (theirs text)")
    found = await doctor.examine(store={"url": pg_url}, upstream=NOWHERE)
    found.expect("store", "FAIL", "another application")


async def test_the_schema_of_a_newer_shim(doctor: Doctor, pg_url: str) -> None:
    prepare(settings.Store(url=pg_url))
    query(pg_url, "UPDATE meta SET value = '99' WHERE key = 'min_reader_version'")
    found = await doctor.examine(store={"url": pg_url}, upstream=NOWHERE)
    found.expect("store", "FAIL", "schema version 99")


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A server that the test may change."""
    with running() as each:
        yield each


@pytest.fixture
def standby(server: Postgres) -> Iterator[Postgres]:
    """Its standby, for which no commit waits."""
    each = Postgres.standby_of(server, synchronous=False)
    yield each
    each.remove()


async def test_tls_and_a_certificate_of_another_authority(doctor: Doctor, server: Postgres, tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    for name, ca in (("ca", authority), ("other", other)):
        ca.cert_pem.write_to_path(str(tmp_path / name))
    url = (await asyncio.to_thread(server.create)).partition("?")[0]
    await asyncio.to_thread(server.certify, authority.issue_cert("127.0.0.1"))
    store: dict[str, Any] = {"url": url, "ca_file": str(tmp_path / "ca")}
    found = await doctor.examine(store=store, upstream=NOWHERE)
    found.expect("store", "PASS", "over TLS")
    found = await doctor.examine(store={**store, "ca_file": str(tmp_path / "other")}, upstream=NOWHERE)
    found.expect("store", "FAIL", "certificate")


async def test_standbys_that_commits_wait_for_or_not(doctor: Doctor, server: Postgres, standby: Postgres) -> None:
    url = server.url("postgres")
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("replication", "WARN", "replicate from it: 1", "synchronous_standby_names")
    await asyncio.to_thread(server.sql, "ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    await asyncio.to_thread(server.sql, "SELECT pg_reload_conf()")
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("replication", "PASS", "standby")
    found.expect("commit", "PASS")
    await asyncio.to_thread(standby.stop)
    found = await doctor.examine(store={"url": url}, upstream=NOWHERE)
    found.expect("commit", "FAIL", "waits for a standby", "synchronous_standby_names")
