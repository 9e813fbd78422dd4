"""Commits whose database fails: they are refused, waited for, or told as they were, and never guessed."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from shim.config import settings
from shim.core.records import CommandState, FindCommand, MoveSession, PutOutcome
from shim.errors import StoreError, StoreFenced
from shim.store import CommitProbe

pytest.importorskip("psycopg")

from shim.store.postgres.database import prepare
from shim.store.postgres.dsn import application
from shim.store.writer import UNOBSERVED
from tests.support import postgres as pg
from tests.support.disks import fill, mounted
from tests.support.postgres_stores import client_of, owner, stored
from tests.support.stores import KEY, OTHER, STRANGER, TIMEOUT_S, StoreClient, mark, put, until

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


IN_COMMIT = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def accepted(client: StoreClient, name: str) -> None:
    """Submit until the store has recovered."""
    until(lambda: isinstance(client.wait(client.submit(put(name))), PutOutcome))


class Cutter:
    """A proxy that cuts the connection at the next COMMIT: before the server has it, or before its answer is back."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut = ""
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._up, args=(near, far), daemon=True).start()
            threading.Thread(target=self._down, args=(near, far), daemon=True).start()

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        name = b""
        while data := self._read(near):
            if found := re.search(rb"(s\d+)\0COMMIT\0", data):
                name = found[1]
            if self.cut and name and b"\0" + name + b"\0" in data:
                self.cuts += 1
                how, self.cut = self.cut, ""
                near.shutdown(socket.SHUT_RDWR)  # first: the answer must not get through
                if how == "after":
                    far.sendall(data)
                break
            far.sendall(data)
        far.close()

    def _down(self, near: socket.socket, far: socket.socket) -> None:
        while data := self._read(far):
            try:
                near.sendall(data)
            except OSError:
                break
        near.close()

    @staticmethod
    def _read(one: socket.socket) -> bytes:
        try:
            return one.recv(65536)
        except OSError:
            return b""

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_commit_whose_answer_was_lost_is_told_as_it_was(postgres: pg.Postgres, pg_url: str, how: str) -> None:
    cutter = Cutter(postgres.port)
    client = client_of(pg_url.replace(f":{postgres.port}/", f":{cutter.port}/"))
    for number in range(4):
        cutter.cut = how
        waiting = [client.submit(put(f"{number}-{n}")) for n in range(3)]
        assert [client.wait(each).duplicate for each in waiting] == [False] * 3
    client.close()
    cutter.close()
    assert cutter.cuts == 4
    assert stored(pg_url) == [f"{number}-{n}" for number in range(4) for n in range(3)]


def test_a_server_that_restarts_costs_nothing(server: pg.Postgres) -> None:
    url = server.create("shim")
    client = client_of(url)
    for number, restart in enumerate((server.restart, lambda: (server.stop("immediate"), server.start()))):
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(restart)
            names = []
            while not again.done() or not names:
                names.append(f"{number}-{len(names)}")
                client.run(put(names[-1]))
            again.result()
        assert set(names) <= set(stored(url))
    client.close()
    assert len(stored(url)) == len(set(stored(url)))


def test_what_comes_while_nobody_answers_is_refused_and_it_recovers(server: pg.Postgres) -> None:
    url = server.create("shim")
    failed: list[int] = []
    probe = CommitProbe(time.monotonic, lambda *_: None, failed.append)
    client = client_of(url, probe=probe, patience_s=0.5)
    server.stop("immediate")
    with pytest.raises(StoreError, match=r"store\.url"):
        client.run(put("1"))
    with pytest.raises(StoreError):
        client.run(put("2"))
    assert sum(failed) == 2
    server.start()
    accepted(client, "3")
    client.close()
    assert stored(url) == ["3"]


def test_moves_that_nobody_stored_are_carried_out_before_what_comes_after_them(server: pg.Postgres) -> None:
    """The first is refused by the engine, the second while it waits in the queue."""
    client = client_of(server.create("shim"), patience_s=0.5)
    client.run(put("1"))
    server.stop("immediate")
    client.store.submit(MoveSession(KEY, OTHER))
    client.store.submit(MoveSession(OTHER, STRANGER))
    delivered = mark("1", CommandState.DELIVERED, session=STRANGER)
    with pytest.raises(StoreError):
        client.run(delivered)
    server.start()
    until(lambda: client.wait(client.submit(delivered)) is None)
    ((record, _, _),) = client.one(FindCommand("1"))
    assert (record.session, record.state) == (STRANGER, CommandState.DELIVERED)
    client.close()


def test_a_read_only_server_refuses_and_recovers(server: pg.Postgres) -> None:
    url = server.create("shim")
    client = client_of(url, patience_s=0.3)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'agent-shim%'"
    server.sql("ALTER DATABASE shim SET default_transaction_read_only = on")
    server.sql(end)
    with pytest.raises(StoreError, match="read-only"):
        client.run(put("1"))
    server.sql("ALTER DATABASE shim RESET default_transaction_read_only")
    accepted(client, "2")
    client.close()
    assert stored(url) == ["2"]


@contextmanager
def pair(server: pg.Postgres) -> Iterator[pg.Postgres]:
    standby = pg.Postgres.standby_of(server)
    try:
        yield standby
    finally:
        standby.remove()


def test_a_commit_that_waits_for_its_standby_is_told_when_it_is_known(server: pg.Postgres) -> None:
    url = server.create("shim")
    with pair(server) as standby:
        client = client_of(url, patience_s=0.5)
        client.run(put("1"))
        standby.pause()
        waiting = client.submit(put("2"))
        until(lambda: server.sql(IN_COMMIT))
        # What is queued behind a commit in doubt is refused, once that has taken too long.
        assert isinstance(client.wait(client.submit(put("3"))), StoreError)
        assert waiting == []
        standby.resume()
        assert isinstance(client.wait(waiting), PutOutcome)
        client.run(put("4"))
        client.close()
    assert stored(url) == ["1", "2", "4"]


def test_a_commit_whose_wait_was_broken_off_by_hand_is_no_success(server: pg.Postgres) -> None:
    url = server.create("shim")
    with pair(server) as standby:
        client = client_of(url)
        standby.pause()
        waiting = client.submit(put("1"))
        until(lambda: server.sql(IN_COMMIT.replace("pid", "pg_cancel_backend(pid)", 1)))
        client.drain()
        assert waiting == []
        standby.resume()
        assert isinstance(client.wait(waiting), PutOutcome)
        client.close()
    assert stored(url) == ["1"]


def test_a_promoted_standby_has_all_that_was_told(server: pg.Postgres) -> None:
    url = server.create("shim")
    with pair(server) as standby:
        both = url.replace(f"127.0.0.1:{server.port}", f"127.0.0.1:{server.port},127.0.0.1:{standby.port}")
        client = client_of(both, patience_s=30)
        told: list[str] = []
        with ThreadPoolExecutor(1) as pool:
            for _ in range(50):
                told.append(f"a-{len(told)}")
                client.run(put(told[-1]))
            server.kill()
            promoted = pool.submit(standby.promote)
            for _ in range(50):
                told.append(f"b-{len(told)}")
                client.run(put(told[-1]))
            promoted.result()
        client.close()
        assert stored(standby.url("shim")) == told


def test_who_lost_the_lease_commits_nothing_more(pg_url: str) -> None:
    fenced: list[bool] = []
    probe = CommitProbe(time.monotonic, lambda *_: None, fenced=lambda: fenced.append(True))
    client = client_of(pg_url, probe=probe)
    client.run(put("1"))
    partition = pg.lease(pg_url, process="p2")
    assert partition.fence == 2
    for _ in range(2):
        with pytest.raises(StoreFenced):
            client.run(put("2"))
    client.drain()
    client.close()
    assert stored(pg_url) == ["1"]
    assert fenced == [True]
    with pytest.raises(StoreFenced):
        pg.PostgresStore(settings.Store(url=pg_url), list, UNOBSERVED, partition._replace(fence=1)).open()


ROUNDS = 6


def test_an_owner_that_was_stopped_in_its_commits_wakes_up_fenced(pg_url: str) -> None:
    prepare(settings.Store(url=pg_url))
    for number in range(ROUNDS):
        process = f"p{number}"
        with owner(pg_url, process) as victim:
            assert victim.stdout is not None
            told = [victim.stdout.readline().strip() for _ in range(20 + 7 * number)]
            victim.send_signal(signal.SIGSTOP)
            # Whoever takes over ends the backend, which may hold the lease's row in a transaction.
            name = application(process, 0)
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = "
            pg.query(pg_url, f"{end}'{name}'")
            taker = client_of(pg_url, process="taker")
            taken = set(stored(pg_url))
            taker.run(put(f"taker-{number}"))
            victim.send_signal(signal.SIGCONT)
            rest = victim.stdout.read().split()
            assert victim.wait(TIMEOUT_S) == 0
            taker.close()
        assert rest[-1] == "fenced"
        assert set(told + rest[:-1]) <= taken
        assert set(stored(pg_url)) == taken | {f"taker-{number}"}


def fill_up(client: StoreClient) -> None:
    for number in range(10_000):
        client.run(*(put(f"x-{number}-{n}", payload={"x": "x" * 4000}) for n in range(20)))


def test_a_full_disk_refuses_and_recovers(server: pg.Postgres) -> None:
    folder = server.directory / "small"
    folder.mkdir()
    with mounted(folder, 24) as works:
        if not works:
            pytest.skip("may not mount")
        server.give(folder)
        server.sql(f"CREATE TABLESPACE small LOCATION '{folder}'")
        server.sql("CREATE DATABASE shim TABLESPACE small")
        url = server.url("shim")
        client = client_of(url)
        client.run(put("1"))
        filler = folder / "filler"
        fill(filler)
        with pytest.raises(StoreError, match="disk is full"):
            fill_up(client)
        filler.unlink()
        client.run(put("2"))
        client.close()
        assert {"1", "2"} <= set(stored(url))
        server.stop("immediate")
