"""The database at the start: what is refused, and left as it is."""

from __future__ import annotations

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shim.config import settings
from shim.core.records import CommandState, FindCommand, Prune
from shim.errors import StoreError, StoreVersionError

pytest.importorskip("psycopg")

from shim.store.postgres.database import prepare, script
from shim.store.postgres.inspection import inspect
from shim.store.schema import SCHEMA_VERSION
from tests.support import postgres as pg
from tests.support.postgres_stores import client_of, stored
from tests.support.processes import free_port, refusing_port
from tests.support.stores import mark, until

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"database": "nowhere"}, "no such database"),
        ({"password": "wrong"}, "refuses the password"),
        ({"user": "stranger"}, "refuses the password"),
    ],
)
def test_a_database_that_cannot_be_entered_is_named_without_the_password(
    postgres: pg.Postgres, change: dict[str, str], said: str
) -> None:
    with pytest.raises(StoreError, match=said) as error:
        prepare(settings.Store(url=postgres.url(**{"database": "postgres", **change})))
    assert "store.url" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_nobody_listens() -> None:
    with refusing_port() as port, pytest.raises(StoreError, match=r"store\.url: no connection"):
        prepare(settings.Store(url=f"postgresql://u:hunter2@127.0.0.1:{port}/shim"))


def test_a_user_without_rights_is_told_what_to_grant(postgres: pg.Postgres) -> None:
    url = postgres.create()
    postgres.sql("CREATE ROLE poor LOGIN PASSWORD 'p'")
    poor = settings.Store(url=postgres.url(url.rpartition("/")[2].partition("?")[0], "poor", "p"))
    with pytest.raises(StoreError, match="GRANT CREATE ON DATABASE"):
        prepare(poor)
    pg.query(url, "CREATE SCHEMA agent_shim AUTHORIZATION poor")
    prepare(poor)
    postgres.sql("ALTER ROLE poor CONNECTION LIMIT 0")
    with pytest.raises(StoreError, match="too many connections"):
        prepare(poor)


@pytest.mark.parametrize("table", ["CREATE TABLE agent_shim.meta (a int)", "CREATE TABLE agent_shim.theirs (a int)"])
def test_the_schema_of_another_application_is_left_alone(pg_url: str, table: str) -> None:
    pg.query(pg_url, "CREATE SCHEMA agent_shim")
    pg.query(pg_url, table)
    with pytest.raises(StoreError, match="another application"):
        prepare(settings.Store(url=pg_url))
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'agent_shim'"
    assert pg.query(pg_url, tables) == [(1,)]


def test_a_newer_schema_is_left_alone_and_a_readable_one_used(pg_url: str) -> None:
    prepare(settings.Store(url=pg_url))
    pg.query(pg_url, "UPDATE meta SET value = '7' WHERE key = 'schema_version'")
    prepare(settings.Store(url=pg_url))
    pg.query(pg_url, "UPDATE meta SET value = '6' WHERE key = 'min_reader_version'")
    with pytest.raises(StoreVersionError, match="schema version 6"):
        prepare(settings.Store(url=pg_url))
    with pytest.raises(StoreVersionError):
        client_of(pg_url)


def test_another_encoding_is_refused(postgres: pg.Postgres) -> None:
    postgres.sql("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(StoreError, match="encoded as SQL_ASCII"):
        prepare(settings.Store(url=postgres.url("ascii")))


def test_many_replicas_start_at_once(pg_url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: prepare(settings.Store(url=pg_url)), range(6)))
    assert pg.query(pg_url, "SELECT value FROM meta WHERE key = 'schema_version'") == [(str(SCHEMA_VERSION),)]


def test_a_database_of_the_first_schema_is_used_with_what_it_holds(pg_url: str) -> None:
    pg.query(pg_url, "CREATE SCHEMA agent_shim")
    pg.query(pg_url, f"SET agent_shim.shard = 0; {script(0)}")
    pg.query(pg_url, "UPDATE meta SET value = '1' WHERE key LIKE '%version'")
    pg.query(
        pg_url,
        "INSERT INTO commands (shard, session, id, request_id, state, attempts, updated, arrived, expires, size_bytes,"
        " type, created_at, payload, via, first_step)"
        " SELECT 0, 'default/cluster/c-1', id, '', state, 1, 2, 1, 1e9, 2, 'exec', '', '{}', 'ws', 'arrived'"
        " FROM (VALUES ('old', 'offered'), ('ended', 'delivered')) AS given (id, state)",
    )
    pg.query(pg_url, "INSERT INTO traces (command, wall, event, detail) SELECT seq, 2, 'offered', '' FROM commands")

    client = client_of(pg_url)
    client.run(mark("old", CommandState.DELIVERED, 3.0))
    ((record, _, trace),) = client.one(FindCommand("old"))
    assert (record.state, [each.event for each in trace]) == (
        CommandState.DELIVERED,
        ["arrived", "offered", "delivered"],
    )
    client.one(Prune(2.5))
    assert stored(pg_url) == ["old"]
    client.one(Prune(4.0))
    assert stored(pg_url) == []
    assert pg.query(pg_url, "SELECT count(*) FROM traces") == [(0,)]


@pytest.mark.needs("pgbouncer")
@pytest.mark.parametrize("ignored", ["", "ignore_startup_parameters = extra_float_digits,options"])
def test_a_pooler_is_found(postgres: pg.Postgres, pg_url: str, ignored: str) -> None:
    port, folder = free_port(), Path(postgres.directory)
    name = pg_url.rpartition("/")[2].partition("?")[0]
    (folder / "users.txt").write_text(f'"{pg.USER}" "{pg.PASSWORD}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={postgres.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nauth_type = plain\nauth_file = {folder}/users.txt\npool_mode = transaction\n"
        f"unix_socket_dir =\n{ignored}\n"
    )
    with subprocess.Popen(
        ["pgbouncer", str(folder / "pgbouncer.ini")], user=pg.user(), group=pg.user(), stderr=subprocess.DEVNULL
    ) as pooler:
        try:
            wait_for_port(port)
            url = f"postgresql://{pg.USER}:{pg.PASSWORD}@127.0.0.1:{port}/{name}"
            for examine in (prepare, inspect):
                with pytest.raises(StoreError, match="pooler"):
                    examine(settings.Store(url=url))
        finally:
            pooler.terminate()


def wait_for_port(port: int) -> None:
    def listens() -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    until(listens)
