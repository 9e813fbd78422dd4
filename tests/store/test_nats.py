"""The NATS store and its servers: crashes between any two writes, servers that die, stop or refuse, other writers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

from shim import settings
from shim.core.records import (
    AddTrace,
    CloseOutbox,
    FindCommand,
    Loaded,
    MarkCommands,
    MoveSession,
    Operation,
    OutboxEntry,
    Prune,
    PutCommand,
    PutOutbox,
    PutResult,
    ReadOutbox,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    State,
    Touch,
    TraceEntry,
)
from shim.errors import StoreError
from shim.store import CommitProbe, open_store
from shim.store.jetstream import Layout, NatsStore
from shim.store.jetstream.layout import Kind, RowKey
from shim.store.jetstream.server import Server, Unavailable
from shim.store.jetstream.worker import Limits
from shim.store.memory import MemoryStore
from tests.support import natsd
from tests.support.natsd import NatsServer, running
from tests.support.stores import KEY, OTHER, STRANGER, TIMEOUT_S, StoreClient, command, put, session

ROOT = Path(__file__).parents[2]
RESULT = {"command_id": "1", "success": True, "output": "done"}
IDS = ("1", "2", "3", "4", "5", "6")

pytestmark = pytest.mark.needs("nats-server")


@pytest.fixture
def clients() -> Iterator[list[StoreClient]]:
    """What is put here is closed in the end."""
    opened: list[StoreClient] = []
    yield opened
    for each in opened:
        each.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path)
    with running(server):
        yield server


@pytest.fixture(scope="module")
def small_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that takes small messages only: a record of any size comes in parts."""
    server = NatsServer(tmp_path_factory.mktemp("small"), "max_payload: 8192\n")
    with running(server):
        yield server.url


# --- crashes ----------------------------------------------------------------------------------------------------------


class CutServer(Server):
    """Dies before or after one of its writes: nothing goes to JetStream afterwards."""

    def __init__(self, configured: settings.Store, at: int, *, performed: bool) -> None:
        super().__init__(configured)
        self.writes = 0
        self._at = at
        self._performed = performed

    async def _cut(self, write: Callable[[], Awaitable[Any]]) -> Any:
        self.writes += 1
        if self.writes > self._at or (self.writes == self._at and not self._performed):
            raise StoreError("cut")
        outcome = await write()
        if self.writes == self._at:
            raise StoreError("cut")
        return outcome

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        seq: int = await self._cut(lambda: super(CutServer, self).publish(subject, body, headers))
        return seq

    async def delete(self, stream: str, seq: int) -> None:
        await self._cut(lambda: super(CutServer, self).delete(stream, seq))

    async def purge(self, stream: str, before: int) -> None:
        await self._cut(lambda: super(CutServer, self).purge(stream, before))


class CutStore(NatsStore):
    at = 0
    performed = False

    def make_server(self) -> Server:
        self.server = CutServer(self._configured, self.at, performed=self.performed)
        return self.server


def cut(at: int, *, performed: bool) -> type[CutStore]:
    return type("Cut", (CutStore,), {"at": at, "performed": performed})


# Each of these writes several rows; the fourth is larger than a message of the server with small ones.
STEPS: tuple[tuple[Operation, ...], ...] = (
    (put("1"), AddTrace(KEY, ("1", "rejected"), TraceEntry(100.0, "arrived")), SaveSession(session())),
    (PutResult(KEY, "1", RESULT, wall=120.0), MarkCommands(KEY, ("1",), State.ANSWERED, 120.0, 1)),
    (PutOutbox(KEY, "9", "r-9", {"code": "expired"}), SaveAlias("default", "pod-1", KEY), SaveTunnel(KEY, {"a": 1})),
    tuple(put(each, payload={"x": "x" * 1500}) for each in IDS[1:]),
    (MoveSession(KEY, STRANGER),),
    (CloseOutbox((1, 2), wall=130.0), MarkCommands(STRANGER, IDS[1:4], State.DEAD, wall=130.0)),
    (Prune(1000.0), put("1"), put("2", STRANGER)),
)


def snapshot(client: StoreClient, loaded: Loaded) -> Any:
    found = [client.one(FindCommand(each)) for each in (*IDS, "rejected")]
    entries = [client.one(ReadOutbox(owner, 0, 100)) for owner in ("default", "0f0f")]
    return replace(loaded, key=b""), found, entries


def snapshots() -> list[Any]:
    """What a store holds before the first step and after each."""
    model = StoreClient(MemoryStore)
    found = [snapshot(model, model.open())]
    for step in STEPS:
        model.run(*step)
        found.append(snapshot(model, model.open()))
    return found


def carried_out(client: StoreClient) -> int:
    """How many steps were acknowledged before the first failure, or an opening that failed."""
    try:
        client.open()
        for number, step in enumerate(STEPS):
            try:
                client.run(*step)
            except StoreError:
                return number
        return len(STEPS)
    except StoreError:
        return 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("performed", [False, True])
def test_a_crash_between_any_two_writes_leaves_each_submission_done_or_not_done(
    small_url: str, performed: bool
) -> None:
    expected = snapshots()
    at, ended = 0, False
    while not ended:
        at += 1
        prefix = f"cut{at}{performed}"
        dying = natsd.client(small_url, prefix, kind=cut(at, performed=performed))
        done = carried_out(dying)
        assert isinstance(dying.store, CutStore)
        ended = dying.store.server.writes < at
        dying.close()
        again = natsd.client(small_url, prefix)
        found = snapshot(again, again.open())
        again.close()
        assert found in expected[done : done + 1 + performed], at
        # and once more: repairing was not only done in memory
        assert snapshot(again, again.open()) == found
        again.close()
        natsd.forget(small_url, prefix)
    assert at > 50


class LossyServer(Server):
    """Carries out every write and loses every second answer; `knows_ids`: whether it remembers message ids."""

    def __init__(self, configured: settings.Store, *, knows_ids: bool) -> None:
        super().__init__(configured)
        self.lost = 0
        self._writes = 0
        self._knows_ids = knows_ids

    def _lose(self) -> None:
        self._writes += 1
        if self._writes % 2:
            self.lost += 1
            raise Unavailable("lost")

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        kept = {name: value for name, value in headers.items() if self._knows_ids or name != "Nats-Msg-Id"}
        seq = await super().publish(subject, body, kept)
        self._lose()
        return seq

    async def delete(self, stream: str, seq: int) -> None:
        await super().delete(stream, seq)
        self._lose()


class LossyStore(NatsStore):
    knows_ids = True

    def make_server(self) -> Server:
        self.server = LossyServer(self._configured, knows_ids=self.knows_ids)
        return self.server


class ForgetfulStore(LossyStore):
    knows_ids = False


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", [LossyStore, ForgetfulStore])
def test_what_was_written_without_an_answer_is_written_once(small_url: str, kind: type[LossyStore]) -> None:
    prefix = kind.__name__
    client = natsd.client(small_url, prefix, kind=kind)
    client.open()
    for step in STEPS:
        client.run(*step)
    client.close()
    assert isinstance(client.store, LossyStore)
    assert client.store.server.lost > 15
    again = natsd.client(small_url, prefix)
    assert snapshot(again, again.open()) == snapshots()[-1]
    again.close()


VICTIM = """
import sys
from shim.core.records import AddTrace, TraceEntry
from tests.support import natsd
from tests.support.stores import KEY, put

client = natsd.client(sys.argv[1])
client.open()
number = 0
while True:
    waiting = []
    for _ in range(20):
        number += 1
        name = f"{sys.argv[2]}-{number}"
        steps = (put(name, payload={"x": "x" * 300}), AddTrace(KEY, (name,), TraceEntry(1.0, "arrived")))
        waiting.append((name, client.submit(*steps)))
    for name, outcome in waiting:
        assert isinstance(client.wait(outcome), list)
        print(name, flush=True)
"""


def test_every_acknowledged_command_survives_sigkill(server: NatsServer, clients: list[StoreClient]) -> None:
    acked: list[str] = []
    for number, lines in enumerate((1, 333, 50)):
        arguments = [sys.executable, "-c", VICTIM, server.url, str(number)]
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None
            acked += [victim.stdout.readline().strip() for _ in range(lines)]
            victim.kill()
            acked += [line.strip() for line in victim.stdout if line.endswith("\n")]
            victim.wait(TIMEOUT_S)
        client = natsd.client(server.url)
        clients.append(client)
        loaded = client.open()
        stored = [record.id for record in loaded.commands]
        assert loaded.quarantined == 0
        assert set(acked) <= set(stored)
        assert len(stored) == len(set(stored))
        # with each command its trace: a submission is whole
        assert all(len(client.one(FindCommand(each))[0][2]) == 1 for each in stored[-25:])
        client.close()
    assert len(acked) >= 384


# --- servers that go and come -----------------------------------------------------------------------------------------


def short(*arguments: Any) -> NatsStore:
    """A store that does not wait long."""
    return NatsStore(*arguments, limits=Limits(commit_s=1.0))


def test_a_server_that_is_gone_is_a_store_error_until_it_is_back(
    server: NatsServer, clients: list[StoreClient]
) -> None:
    client = natsd.client(server.url, kind=short)
    clients.append(client)
    client.open()
    client.run(put("1"), PutResult(KEY, "1", RESULT, wall=120.0))
    server.kill()
    for name in ("2", "3"):
        with pytest.raises(StoreError, match="did not answer"):
            client.one(put(name))
    # what needs no server goes on
    assert client.one(FindCommand("2")) == []
    assert client.one(FindCommand("1"))[0][1] == RESULT

    server.start()
    assert not client.one(put("2")).duplicate
    client.close()
    again = natsd.client(server.url)
    clients.append(again)
    assert [record.id for record in again.open().commands] == ["2"]
    assert again.one(FindCommand("1"))[0][1] == RESULT


def test_a_commit_waits_for_a_server_that_is_soon_back(server: NatsServer, clients: list[StoreClient]) -> None:
    client = natsd.client(server.url)
    clients.append(client)
    client.open()
    server.kill()
    outcome = client.submit(put("1"))
    server.start()
    assert not isinstance(client.wait(outcome), StoreError)


def test_what_was_reported_as_failed_is_taken_back_when_the_server_answers_again(
    server: NatsServer, clients: list[StoreClient]
) -> None:
    client = natsd.client(server.url, kind=short)
    clients.append(client)
    client.open()
    client.one(put("1"))
    client.one(Touch(1.0))  # waits for the rows of the first
    server.signal(signal.SIGSTOP)
    outcome = client.submit(put("2"), put("3"))
    failure = client.wait(outcome)
    server.signal(signal.SIGCONT)
    assert isinstance(failure, StoreError)

    assert client.run(put("4"), FindCommand("2"))[1] == []
    journal = [body for _, body in natsd.messages(server.url, Layout().journal)]
    assert any(part["skip"] for part in journal), "the server had not stored what it did not answer"
    client.close()
    again = natsd.client(server.url)
    clients.append(again)
    assert [record.id for record in again.open().commands] == ["1", "4"]


def test_closing_is_bounded_without_a_server(server: NatsServer) -> None:
    client = natsd.client(server.url)
    client.open()
    client.one(put("1"))
    server.kill()
    outcomes = [client.submit(put(str(n))) for n in range(2, 5)]
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 6.0
    client.drain()
    assert all(isinstance(outcome[0], StoreError) for outcome in outcomes)


def test_of_two_who_open_the_store_the_later_one_has_it(nats_url: str, clients: list[StoreClient]) -> None:
    first, second = natsd.client(nats_url, "two"), natsd.client(nats_url, "two")
    clients += [first, second]
    first.open()
    first.one(put("1"))
    assert [record.id for record in second.open().commands] == ["1"]
    for _ in range(2):
        with pytest.raises(StoreError, match="another shim"):
            first.one(put("2"))
        second.one(Touch(1.0))
    assert not second.one(put("2")).duplicate


def test_streams_that_were_deleted_under_the_store_are_no_place_to_write(
    nats_url: str, clients: list[StoreClient]
) -> None:
    client = natsd.client(nats_url, "gone", kind=short)
    clients.append(client)
    client.open()
    client.run(*(put(each) for each in IDS))
    client.one(Touch(1.0))
    natsd.forget(nats_url, "gone")
    other = natsd.client(nats_url, "gone")
    clients.append(other)
    other.open()
    with pytest.raises(StoreError):
        client.one(Touch(1.0))


@pytest.mark.timeout(180)
def test_a_cluster_of_three_loses_its_leader_and_no_command(tmp_path: Path, clients: list[StoreClient]) -> None:
    servers = natsd.cluster(tmp_path)
    urls = ",".join(server.url for server in servers)
    with running(*servers):
        client = natsd.client(urls, replicas=3, kind=patient)
        clients.append(client)
        client.open()
        info = natsd.streams(servers[0].url)
        assert {each.config.num_replicas for each in info.values()} == {3}
        cluster = info[Layout().journal].cluster
        assert cluster is not None
        (leader,) = (server for server in servers if server.name == cluster.leader)
        client.one(put("before"))
        leader.kill()
        client.one(put("during"))
        leader.start()
        client.one(put("after"))
        client.close()
        again = natsd.client(urls, replicas=3, kind=patient)
        clients.append(again)
        assert [record.id for record in again.open().commands] == ["before", "during", "after"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_larger_than_the_server_takes_fails_alone(small_url: str, clients: list[StoreClient]) -> None:
    failed: list[int] = []
    probe = CommitProbe(lambda: 0.0, lambda commit_s, operations: None, failed.append)
    configured = settings.Store(url=small_url, replicas=1)
    client = StoreClient(lambda post: NatsStore(configured, post, probe, Layout("large")))
    clients.append(client)
    client.open()
    outcomes = [
        client.submit(put("1")),
        client.submit(put("2"), put("3", payload={"x": "x" * 9000})),
        client.submit(put("4")),
    ]
    large = [client.wait(each) for each in outcomes][1]
    assert isinstance(large, StoreError)
    assert "max_payload: 8192" in str(large)
    assert "xxx" not in str(large)
    client.close()
    assert [record.id for record in client.open().commands] == ["1", "4"]
    assert failed == [1]


def test_messages_that_are_no_rows_are_counted_and_left_out(nats_url: str, clients: list[StoreClient]) -> None:
    layout = Layout("foreign")
    client = natsd.client(nats_url, "foreign")
    clients.append(client)
    client.open()
    client.run(put("1"), SaveSession(session()), put("2"))
    client.one(Touch(1.0))  # the last record would mend its rows
    client.close()
    key = RowKey(Kind.STATE, str(KEY), "1")
    natsd.publish(nats_url, layout.subject(key), b'{"seq": 1}')
    natsd.publish(nats_url, layout.subject(RowKey(Kind.TUNNEL, "x", "")), b'{"session": "y", "payload": {}}')
    natsd.publish(nats_url, f"$KV.{layout.sessions.removeprefix('KV_')}.nobody", b"1")

    loaded = client.open()
    assert [record.id for record in loaded.commands] == ["2"]
    assert len(loaded.sessions) == 1
    assert loaded.quarantined == 4  # the three, and the command whose state is gone


def test_what_cannot_be_decoded_is_put_aside_and_named_until_it_is_answered(
    nats_url: str, clients: list[StoreClient]
) -> None:
    client = natsd.client(nats_url, "aside")
    clients.append(client)
    client.open()
    client.run(put("1"), put("2"))
    client.one(Touch(1.0))
    client.close()
    layout = Layout("aside")
    subject = layout.subject(RowKey(Kind.STATE, str(KEY), "1"))
    (body,) = (body for where, body in natsd.messages(nats_url, layout.states) if where == subject)
    natsd.publish(nats_url, subject, natsd.encode(body | {"state": "asleep"}))

    for _ in range(2):
        loaded = client.open()
        assert loaded.quarantined_commands == ((KEY, "1", "r-1"),)
        assert [record.id for record in loaded.commands] == ["2"]
        client.close()
    client.open()
    client.one(PutOutbox(KEY, "1", "r-1", {"code": "malformed"}))
    client.close()
    assert client.open().quarantined_commands == ()


def test_subjects_hold_nothing_of_what_others_chose() -> None:
    owner = RowKey(Kind.COMMAND, "o.*/cluster/> x", "é *.>\ud800")
    for kind in Kind:
        tokens = Layout("p").subject(owner._replace(kind=kind)).removeprefix("$KV.").split(".")
        assert all(token.replace("-", "").isalnum() and token.isascii() for token in tokens)


def test_wrong_credentials_are_refused_without_being_named(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, 'authorization {user: "shim", password: "right"}\n')
    with running(server):
        with pytest.raises(StoreError, match="refuses the credentials") as failure:
            natsd.client(server.url.replace("//", "//shim:wrong-hunter2@")).open()
        assert "hunter2" not in str(failure.value)
        client = natsd.client(server.url.replace("//", "//shim:right@"))
        client.open()
        client.close()


def test_a_credentials_file_opens_the_store(tmp_path: Path) -> None:
    account = natsd.Account()
    server = NatsServer(tmp_path, account.configuration)
    good, bad = tmp_path / "good.creds", tmp_path / "bad.creds"
    good.write_text(account.credentials())
    bad.write_text(natsd.Account().credentials())
    with running(server):
        client = natsd.client(server.url, credentials_file=str(good))
        client.open()
        client.one(put("1"))
        client.close()
        with pytest.raises(StoreError, match="refuses the credentials"):
            natsd.client(server.url, credentials_file=str(bad)).open()
        bad.write_text(account.credentials().replace("SU", "SX"))
        with pytest.raises(StoreError, match="holds no credentials"):
            natsd.client(server.url, credentials_file=str(bad)).open()
        with pytest.raises(StoreError, match="cannot be read"):
            natsd.client(server.url, credentials_file=str(tmp_path / "none")).open()


def test_tls_is_verified_and_never_left_out(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key, trusted = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(trusted)
    server = NatsServer(tmp_path, f'tls {{cert_file: "{chain}", key_file: "{key}"}}\n')
    with running(server):
        url = server.url.replace("nats://", "tls://")
        client = natsd.client(url, ca_file=str(trusted))
        client.open()
        client.one(put("1"))
        client.close()
        with pytest.raises(StoreError, match="not trusted"):
            natsd.client(url).open()
        server.kill()
        server.start(extra="")
        with pytest.raises(StoreError, match="has no TLS"):
            natsd.client(url, ca_file=str(trusted)).open()


def test_more_replicas_than_servers_are_refused_with_the_key_to_change(nats_url: str) -> None:
    with pytest.raises(StoreError, match=r"store\.replicas"):
        natsd.client(nats_url, "many", replicas=3).open()


def test_a_server_without_jetstream_or_none_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be reached"):
        natsd.client("nats://127.0.0.1:1", kind=impatient).open()


def patient(*arguments: Any) -> NatsStore:
    """For three servers on a machine that has other things to do."""
    return NatsStore(*arguments, limits=Limits(commit_s=40.0, open_s=60.0))


def impatient(*arguments: Any) -> NatsStore:
    return NatsStore(*arguments, limits=Limits(open_s=1.0))


def test_who_has_an_older_fencing_token_does_not_get_the_store_any_more(
    nats_url: str, clients: list[StoreClient]
) -> None:
    """A replica that was paused while it opened the store wakes up when another has it."""

    def of(fence: int) -> StoreClient:
        client = natsd.client(nats_url, "tokens", kind=partial(NatsStore, fence=fence))
        clients.append(client)
        return client

    owner = of(7)
    owner.open()
    owner.one(put("1"))
    with pytest.raises(StoreError, match="a later owner"):
        of(6).open()
    owner.one(put("2"))
    successor = of(8)
    assert [record.id for record in successor.open().commands] == ["1", "2"]
    with pytest.raises(StoreError):
        owner.one(put("3"))


class Hurried(Server):
    """Reads any stream by a consumer, as large ones are read."""

    few = 0


def test_large_streams_are_read_by_a_consumer(nats_url: str, clients: list[StoreClient]) -> None:
    class Store(NatsStore):
        def make_server(self) -> Server:
            return Hurried(self._configured)

    first = natsd.client(nats_url, "consumed")
    clients.append(first)
    first.open()
    for number in range(5):
        first.one(put(str(number)))
    second = natsd.client(nats_url, "consumed", kind=Store)
    clients.append(second)
    assert [record.id for record in second.open().commands] == ["0", "1", "2", "3", "4"]


# --- what is kept where -----------------------------------------------------------------------------------------------


def test_rows_stand_where_the_documentation_says_and_go_when_they_are_forgotten(
    nats_url: str, clients: list[StoreClient]
) -> None:
    layout = Layout("where")
    client = natsd.client(nats_url, "where")
    clients.append(client)
    client.open()
    client.run(put("1"), AddTrace(KEY, ("1",), TraceEntry(1.0, "arrived")), PutResult(KEY, "1", RESULT, wall=2.0))
    client.run(SaveSession(session()), SaveAlias("default", "pod-1", KEY), SaveTunnel(KEY, {"a": 1}))
    client.one(put("2", OTHER))
    client.close()
    found = {
        name: [each for each in natsd.messages(nats_url, name) if each[0] != layout.marker(name)]
        for name in layout.rows
    }
    assert [body["id"] for _, body in found[layout.commands]] == ["1", "2"]
    assert [body["payload"] for _, body in found[layout.outbox]] == [RESULT]
    states = [body for _, body in found[layout.states]]
    assert [body["result"] for body in states if "result" in body] == [RESULT]
    assert [body["trace"] for body in states if body.get("trace")] == [[[1, 1.0, "arrived", ""]]]
    assert len(found[layout.sessions]) == 4  # and the key
    info = natsd.streams(nats_url)
    assert str(info[layout.commands].config.retention) == "workqueue"
    assert info[layout.journal].state.messages == 1
    assert [info[name].state.consumer_count for name in (*layout.rows, layout.journal)] == [0] * 5

    client.open()
    entries: list[OutboxEntry] = client.one(ReadOutbox("default", 0, 9))
    client.run(CloseOutbox((entries[0].seq,), 3.0), MarkCommands(OTHER, ("2",), State.DEAD, 3.0), Prune(1000.0))
    client.close()
    info = natsd.streams(nats_url)
    assert [info[name].state.messages for name in layout.rows] == [1, 1, 1, 5]  # and the openings' marks


def test_a_commands_content_is_as_it_was_put_also_after_the_journal_was_shortened(
    nats_url: str, clients: list[StoreClient]
) -> None:
    client = natsd.client(nats_url, "short")
    clients.append(client)
    client.open()
    seqs = [client.one(PutCommand(command(str(n), payload={"n": n}))).seq for n in range(150)]
    assert natsd.streams(nats_url)[Layout("short").journal].state.messages <= 65
    client.close()
    assert [(record.seq, record.payload) for record in client.open().commands] == [
        (seq, {"n": n}) for n, seq in enumerate(seqs)
    ]


# --- the extra --------------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


def test_nothing_of_nats_is_imported_without_a_url() -> None:
    code = """
import sys
import shim.app, shim.cli
from shim import settings
from shim.store import open_store
store = open_store(settings.Store(path=":memory:"), lambda call: call())
store.open()
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("nats", "nacl") or "jetstream" in name))
"""
    assert run_python(code).strip() == "[]"


def test_the_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["nats"] = None
from shim import settings
from shim.errors import StoreError
from shim.store import open_store
try:
    open_store(settings.Store(url="nats://user:hunter2@nats"), lambda call: None)
except StoreError as error:
    print(error)
"""
    said = run_python(code)
    assert "agent-shim[nats]" in said
    assert "hunter2" not in said


def test_the_url_opens_a_nats_store_under_the_names_of_the_documentation(server: NatsServer) -> None:
    client = StoreClient(lambda post: open_store(settings.Store(url=server.url, replicas=1), post))
    client.open()
    client.close()
    assert {*Layout().rows, Layout().journal} == set(natsd.streams(server.url))
