"""What can befall a database behind a network: it is refused, waited for, or told as it was, and never guessed."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from shim.config import settings
from shim.core.records import (
    AddTrace,
    CloseOutbox,
    CommandState,
    FindCommand,
    MarkCommands,
    Prune,
    PutOutbox,
    PutOutcome,
    PutResult,
    ReadOutbox,
    TraceEntry,
)
from shim.errors import StoreError, StoreFenced, StoreVersionError
from shim.store import CommitProbe
from tests.support.stores import KEY, POISON, TIMEOUT_S, StoreClient, put

pytest.importorskip("psycopg")

from shim.store.postgres.database import prepare
from shim.store.postgres.dsn import application, conninfo
from shim.store.postgres.inspection import inspect
from tests.support import postgres as pg
from tests.support.disks import fill, mounted
from tests.support.processes import free_port, refusing_port

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[pg.Postgres]:
    """A server of the test's own, to be ill-treated."""
    with pg.running() as server:
        yield server


@pytest.fixture(autouse=True)
def _closed(_no_thread_is_left: None) -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


OPEN: list[StoreClient] = []


def client_of(url: str, **how: Any) -> StoreClient:
    OPEN.append(StoreClient(lambda post: pg.store(url, post, **how)))
    OPEN[-1].open()
    return OPEN[-1]


IN_COMMIT = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def until(condition: Callable[[], Any]) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def accepted(client: StoreClient, name: str) -> None:
    """Submit until the store has recovered."""
    until(lambda: isinstance(client.wait(client.submit(put(name))), PutOutcome))


def stored(url: str) -> list[str]:
    return [row[0] for row in pg.query(url, "SELECT id FROM commands ORDER BY seq")]


# --- what is refused at the start, and left as it is ------------------------------------------------------------------


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
    assert pg.query(pg_url, "SELECT value FROM meta WHERE key = 'schema_version'") == [("1",)]


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


def test_a_password_from_a_file_is_read_for_each_connection(pg_url: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("old-hunter2")
    configured = settings.Store(url=pg_url.replace(f":{pg.PASSWORD}", ""), password_file=str(file))
    with pytest.raises(StoreError, match=r"store\.password_file"):
        prepare(configured)
    file.write_text(pg.PASSWORD + "\n")
    prepare(configured)


@pytest.mark.parametrize(
    "store, expected",
    [
        ({"url": "postgresql://h.example/d"}, "sslmode=verify-full"),
        ({"url": "postgresql://h.example/d", "ca_file": "/ca"}, "sslrootcert=/ca"),
        ({"url": "postgresql://h.example/d?sslmode=prefer", "allow_insecure": True}, "sslmode=prefer"),
        ({"url": "postgresql://127.0.0.1/d", "ca_file": "/ca"}, "sslmode=verify-full"),
        ({"url": "postgresql://h/d", "client_cert_file": "/c", "client_key_file": "/k"}, "sslkey=/k"),
        ({"url": "postgresql://a.example,b.example/d"}, "target_session_attrs=read-write"),
    ],
)
def test_connection_parameters(store: dict[str, Any], expected: str) -> None:
    assert expected in conninfo(settings.Store(**store), "agent-shim x").split()


# --- commits in doubt -------------------------------------------------------------------------------------------------


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


# --- the standby ------------------------------------------------------------------------------------------------------


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


# --- the fence --------------------------------------------------------------------------------------------------------


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
        pg.PostgresStore(settings.Store(url=pg_url), list, None, partition._replace(fence=1)).open()


def test_shards_see_their_own_only(pg_url: str) -> None:
    one, two = client_of(pg_url, shard=0), client_of(pg_url, shard=1)
    one.run(put("1"))
    for client in (one, two):
        client.close()
    one, two = (StoreClient(lambda post, shard=shard: pg.store(pg_url, post, shard=shard)) for shard in (0, 1))  # type: ignore[misc]
    assert [len(each.open().commands) for each in (one, two)] == [1, 0]
    one.close()
    two.close()


OWNER = """
import sys
from shim.errors import StoreFenced
from tests.support import postgres
from tests.support.stores import StoreClient, put
client = StoreClient(lambda post: postgres.store(sys.argv[1], post, process=sys.argv[2]))
client.open()
number = 0
while True:
    waiting = []
    for _ in range(10):
        number += 1
        waiting.append((f"{sys.argv[2]}-{number}", client.submit(put(f"{sys.argv[2]}-{number}"))))
    for name, outcome in waiting:
        found = client.wait(outcome)
        if isinstance(found, StoreFenced):
            print("fenced", flush=True)
            sys.exit(0)
        print(name, flush=True)
"""
ROUNDS = 6


def owner(url: str, process: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", OWNER, url, process], cwd=ROOT, stdout=subprocess.PIPE, text=True)


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


def test_no_operation_of_a_command_reads_a_whole_table(pg_url: str) -> None:
    """Also with plans that were made while the tables were empty."""
    scans = "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ('commands', 'traces', 'outbox')"
    pg.store(pg_url, list)
    before = sorted(pg.query(pg_url, scans))
    client = client_of(pg_url)
    names = [str(number) for number in range(300)]
    for name in names:
        client.submit(put(name), AddTrace(KEY, (name,), TraceEntry(100.0, "arrived", "exec")))
    for state in (CommandState.OFFERED, CommandState.DELIVERED):
        for name in names:
            client.submit(MarkCommands(KEY, (name,), state, 2.0, 1), AddTrace(KEY, (name,), TraceEntry(2.0, "step")))
    for name in names:
        client.submit(PutResult(KEY, name, {}, 3.0), AddTrace(KEY, (name,), TraceEntry(3.0, "result")))
    entries = client.one(ReadOutbox("default", 0, 1000))
    assert len(entries) == 300
    client.run(CloseOutbox(tuple(entry.seq for entry in entries), 4.0), FindCommand("7"), Prune(500.0))
    client.close()
    assert sorted(pg.query(pg_url, scans)) == before
    assert stored(pg_url) == []


def test_commands_that_share_a_statement_keep_their_order_and_their_outcomes(pg_url: str) -> None:
    client = client_of(pg_url)
    names = [str(number) for number in range(75)]
    steps = [[put(name), AddTrace(KEY, (name,), TraceEntry(100.0, "arrived", "exec"))] for name in [*names, "3", "40"]]
    found = [client.wait(outcome) for outcome in [client.submit(*each) for each in steps]]
    assert [each.duplicate for each in found] == [False] * 75 + [True] * 2
    assert (found[75].seq, found[76].seq) == (found[3].seq, found[40].seq)
    assert stored(pg_url) == names
    ((_, _, trace),) = client.one(FindCommand("3"))
    assert [step.event for step in trace] == ["arrived", "arrived"]
    client.close()


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


def test_a_database_off_this_machine_must_prove_who_it_is(server: pg.Postgres, tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    for name, authority in (("ours", ours), ("theirs", theirs)):
        authority.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    server.certify(ours.issue_cert("127.0.0.1"))
    url = server.create("shim").replace("?sslmode=disable", "")
    for ca, said in (("ours", ""), ("theirs", "certificate")):
        configured = settings.Store(url=url, ca_file=str(tmp_path / f"{ca}.pem"))
        if not said:
            prepare(configured)
            continue
        with pytest.raises(StoreError, match=said):
            prepare(configured)
    server.certify(ours.issue_cert("elsewhere.example"))
    with pytest.raises(StoreError, match="does not match host name"):
        prepare(settings.Store(url=url, ca_file=str(tmp_path / "ours.pem")))
