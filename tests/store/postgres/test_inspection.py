"""What doctor reads of a database: facts, and nothing is changed."""

from __future__ import annotations

import pytest

from shim.config import settings
from shim.errors import StoreError
from shim.store.schema import SCHEMA_VERSION

pytest.importorskip("psycopg")

from shim.store.postgres.database import prepare
from shim.store.postgres.inspection import PATIENCE_S, inspect
from tests.support import postgres as pg
from tests.support.processes import refusing_port

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(120)]


def test_a_new_database_and_a_prepared_one(postgres: pg.Postgres, pg_url: str) -> None:
    configured = settings.Store(url=pg_url)
    found = inspect(configured)
    assert (found.host, found.port, found.encrypted) == ("127.0.0.1", postgres.port, False)
    assert found.version >= 14
    assert (found.may_write, found.schema) == (True, 0)
    assert (found.standbys, found.synchronous_names) == (0, "")
    assert 0 < found.commit_s < PATIENCE_S
    assert pg.query(pg_url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'agent_shim'") == [(0,)]
    prepare(configured)
    assert inspect(configured).schema == SCHEMA_VERSION


def test_a_user_that_may_read_only(postgres: pg.Postgres, pg_url: str) -> None:
    prepare(settings.Store(url=pg_url))
    postgres.sql("CREATE ROLE inspected LOGIN PASSWORD 'read-only'")
    found = inspect(
        settings.Store(url=postgres.url(pg_url.rpartition("/")[2].partition("?")[0], "inspected", "read-only"))
    )
    assert not found.may_write


def test_nobody_listens() -> None:
    with refusing_port() as port, pytest.raises(StoreError, match=r"store\.url: no connection"):
        inspect(settings.Store(url=f"postgresql://u:hunter2@127.0.0.1:{port}/shim"))
