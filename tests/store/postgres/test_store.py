"""Commands of one shard on a real PostgreSQL."""

from __future__ import annotations

from typing import Any

import pytest

from shim.core.records import PutOutbox, PutResult, ReadOutbox
from shim.errors import StoreError

pytest.importorskip("psycopg")

from tests.support import postgres as pg
from tests.support.postgres_stores import client_of, owner, stored
from tests.support.stores import KEY, POISON, StoreClient, put

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


def test_shards_see_their_own_only(pg_url: str) -> None:
    one, two = client_of(pg_url, shard=0), client_of(pg_url, shard=1)
    one.run(put("1"))
    for client in (one, two):
        client.close()
    one, two = (StoreClient(lambda post, shard=shard: pg.store(pg_url, post, shard=shard)) for shard in (0, 1))  # type: ignore[misc]
    assert [len(each.open().commands) for each in (one, two)] == [1, 0]
    one.close()
    two.close()


def test_every_acknowledged_command_survives_sigkill(pg_url: str) -> None:
    told: list[str] = []
    for number in range(4):
        with owner(pg_url, f"k{number}") as victim:
            assert victim.stdout is not None
            told += [victim.stdout.readline().strip() for _ in range(30 + 40 * number)]
            victim.kill()
            told += [line.strip() for line in victim.stdout if line.endswith("\n")]
        client = StoreClient(lambda post: pg.store(pg_url, post))
        names = [record.id for record in client.open().commands]
        client.close()
        assert set(told) <= set(names)
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "change, known",
    [
        ("payload = '{'", (KEY, "1", "r-1")),
        ("payload = '[]'", (KEY, "1", "r-1")),
        (r"payload = '\xff'", (KEY, "1", "r-1")),
        ("state = 'dreaming'", (KEY, "1", "r-1")),
        ("session = 'no key'", (None, "1", "r-1")),
    ],
)
def test_a_command_that_cannot_be_decoded_is_put_aside_and_named(pg_url: str, change: str, known: Any) -> None:
    client = client_of(pg_url)
    client.run(put("1"), put("2"), PutResult(KEY, "2", {"ok": True}, 3.0))
    client.close()
    pg.query(pg_url, f"UPDATE commands SET {change} WHERE id = '1'")  # noqa: S608
    pg.query(pg_url, "UPDATE outbox SET payload = '{'")
    for quarantined in (1, 0):
        client = StoreClient(lambda post: pg.store(pg_url, post))
        loaded = client.open()
        assert (loaded.quarantined, loaded.commands) == (quarantined, ())
        # One that has a session is named until it is answered.
        assert loaded.quarantined_commands == ((known,) if quarantined or known[0] else ())
        (entry,) = client.one(ReadOutbox("default", 0, 10))
        assert entry.payload["code"] == "malformed"
        client.close()
    client = client_of(pg_url)
    client.run(PutOutbox(KEY, "1", "r-1", {"code": "malformed"}))
    client.close()
    client = StoreClient(lambda post: pg.store(pg_url, post))
    assert client.open().quarantined_commands == ()
    client.close()
    assert pg.query(pg_url, "SELECT origin, pending FROM quarantine ORDER BY origin") == [
        ("commands", False),
        ("outbox", False),
    ]


def test_a_submission_that_cannot_be_stored_fails_alone(pg_url: str) -> None:
    client = client_of(pg_url)
    huge = put("huge", size_bytes=1 << 70)
    waiting = [client.submit(each) for each in (put("1"), huge, *POISON, put("2"))]
    found = [client.wait(each) for each in waiting]
    assert [isinstance(each, StoreError) for each in found] == [False, True, True, True, False]
    client.close()
    assert stored(pg_url) == ["1", "2"]
