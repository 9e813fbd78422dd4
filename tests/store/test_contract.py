"""What every command store does with each operation; one suite for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from shim.config import settings
from shim.core.records import (
    AddTrace,
    CloseOutbox,
    CommandRecord,
    CommandState,
    DeleteSession,
    FindCommand,
    LookUpCommand,
    MarkCommands,
    MoveSession,
    Operation,
    OutboxEntry,
    Prune,
    PutCommand,
    PutOutbox,
    PutOutcome,
    PutResult,
    ReadOutbox,
    RequeueCommand,
    ResultOutcome,
    SaveAlias,
    SaveSession,
    SaveTunnel,
    TraceEntry,
    WriteProbe,
)
from shim.errors import StoreError
from shim.store import open_store
from tests.support.memory_store import MAX_LONE_TRACES, MemoryStore
from tests.support.stores import KEY, OTHER, POISON, STRANGER, StoreClient, command, mark, put, session

Make = Callable[[], StoreClient]
Reopen = Callable[[StoreClient], StoreClient]
RESULT = {"command_id": "1", "success": True, "output": "done"}


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.needs("postgresql"))])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "postgres":
        from tests.support import postgres  # noqa: PLC0415 - the driver is an extra

        url = request.getfixturevalue("pg_url")
        return lambda: StoreClient(lambda post: postgres.store(url, post))
    if request.param == "memory":
        return lambda: StoreClient(MemoryStore)
    return lambda: StoreClient(lambda post: open_store(settings.Store(path=str(tmp_path / "shim.db")), post))


@pytest.fixture
def client(make: Make) -> Iterator[StoreClient]:
    client = make()
    client.open()
    yield client
    client.close()


@pytest.fixture
def reopen(make: Make) -> Iterator[Reopen]:
    """Close a store and open what it left behind."""
    opened: list[StoreClient] = []

    def again(client: StoreClient) -> StoreClient:
        client.close()
        if isinstance(client.store, MemoryStore):
            return client
        opened.append(make())
        return opened[-1]

    yield again
    for each in opened:
        each.close()


def found(client: StoreClient, command_id: str) -> list[tuple[CommandRecord, object, list[TraceEntry]]]:
    answer: list[tuple[CommandRecord, object, list[TraceEntry]]] = client.one(FindCommand(command_id))
    return answer


def state_of(client: StoreClient, command_id: str) -> CommandState:
    return found(client, command_id)[0][0].state


def outbox(client: StoreClient, owner: str = "default", after: int = 0, limit: int = 100) -> list[OutboxEntry]:
    entries: list[OutboxEntry] = client.one(ReadOutbox(owner, after, limit))
    return entries


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_command_comes_back_as_it_was_put(client: StoreClient, reopen: Reopen) -> None:
    record = command("1", payload={"deep": [{"a": 1.5}, "ü\x00\n", True, None, 2**63]}, via="http", attempts=2)
    outcome = client.one(PutCommand(record))
    assert (outcome.duplicate, outcome.result) == (False, None)

    assert reopen(client).open().commands == (replace(record, seq=outcome.seq),)


def test_commands_are_numbered_upwards_and_loaded_in_that_order(client: StoreClient, reopen: Reopen) -> None:
    seqs = [client.one(each).seq for each in (put("b"), put("a", OTHER), put("c"))]
    assert seqs == sorted(set(seqs))
    assert seqs[0] > 0

    assert [record.id for record in reopen(client).open().commands] == ["b", "a", "c"]


def test_a_number_is_never_given_twice(client: StoreClient) -> None:
    first = client.one(put("1", state=CommandState.DEAD)).seq
    client.one(Prune(1000.0))
    assert client.one(put("1")).seq > first


def test_the_same_id_is_a_duplicate_until_it_is_pruned(client: StoreClient, reopen: Reopen) -> None:
    seq = client.one(put("1")).seq
    client.one(mark("1", CommandState.DELIVERED))

    client = reopen(client)
    client.open()
    again = client.one(put("1", payload={"other": 1}))
    assert (again.seq, again.duplicate, again.state, again.result) == (seq, True, CommandState.DELIVERED, None)
    assert found(client, "1")[0][0].payload == command("1").payload

    client.one(Prune(110.5))
    assert not client.one(put("1")).duplicate


def test_the_same_id_in_another_session_is_another_command(client: StoreClient) -> None:
    assert [client.one(put("1", key)).duplicate for key in (KEY, OTHER, STRANGER)] == [False] * 3
    assert [record.session for record, _, _ in found(client, "1")] == [KEY, OTHER, STRANGER]


def test_a_duplicate_tells_the_result_also_after_the_controller_has_it(client: StoreClient) -> None:
    client.run(put("1"), PutResult(KEY, "1", RESULT, wall=120.0))
    assert client.one(put("1")).result == RESULT
    client.one(CloseOutbox((outbox(client)[0].seq,), wall=130.0))
    again = client.one(put("1"))
    assert (again.duplicate, again.state, again.result) == (True, CommandState.CLOSED, RESULT)


def test_marking_counts_attempts_and_ignores_unknown_ids(client: StoreClient) -> None:
    client.run(put("1"), put("2"), put("1", OTHER))
    client.one(mark(("1", "nobody"), CommandState.OFFERED, attempts=1))
    client.one(mark(("1", "2"), CommandState.OFFERED, 111.0, attempts=1))
    client.one(mark("2", CommandState.QUEUED, 112.0, attempts=-1))

    assert {(r.session, r.id): (r.state, r.attempts) for i in "12" for r, _, _ in found(client, i)} == {
        (KEY, "1"): (CommandState.OFFERED, 2),
        (KEY, "2"): (CommandState.QUEUED, 0),
        (OTHER, "1"): (CommandState.QUEUED, 0),
    }


def test_a_change_that_is_carried_out_after_the_result_changes_no_state(client: StoreClient, reopen: Reopen) -> None:
    client.run(put("1"), PutResult(KEY, "1", RESULT, wall=120.0))
    for state in (CommandState.DELIVERED, CommandState.UNCERTAIN):
        client.one(mark("1", state, 121.0))
        assert state_of(client, "1") == CommandState.ANSWERED
    client.one(CloseOutbox((outbox(client)[0].seq,), wall=130.0))
    client.one(mark("1", CommandState.UNCERTAIN, 131.0))
    assert state_of(client, "1") == CommandState.CLOSED
    assert reopen(client).open().commands == ()


@pytest.mark.parametrize("state", CommandState)
def test_a_command_is_queued_again_by_hand_only_when_it_has_ended_without_a_result(
    client: StoreClient, reopen: Reopen, state: CommandState
) -> None:
    client.run(put("1"), mark("1", state, attempts=5), put("1", OTHER))
    ended = state in (CommandState.DELIVERED, CommandState.EXPIRED, CommandState.DEAD)
    assert client.one(RequeueCommand(KEY, "1", wall=500.0, expires_unix=900.0)) is ended
    assert client.one(RequeueCommand(KEY, "nobody", wall=500.0, expires_unix=900.0)) is False

    client = reopen(client)
    client.open()
    assert {(r.session, r.state, r.attempts, r.expires_unix) for r, _, _ in found(client, "1")} == {
        (KEY, CommandState.QUEUED, 0, 900.0) if ended else (KEY, state, 5, 200.0),
        (OTHER, CommandState.QUEUED, 0, 200.0),
    }


def test_only_commands_that_may_still_be_offered_are_loaded(client: StoreClient, reopen: Reopen) -> None:
    for each in CommandState:
        client.run(put(each.value), mark(each.value, each))
    loaded = reopen(client).open()
    assert [record.state for record in loaded.commands] == [
        CommandState.QUEUED,
        CommandState.OFFERED,
        CommandState.UNCERTAIN,
    ]


@pytest.mark.parametrize("state", CommandState)
def test_pruning_forgets_what_ended_and_keeps_what_is_awaited(client: StoreClient, state: CommandState) -> None:
    trace = AddTrace(KEY, ("1",), TraceEntry(105.0, "arrived"))
    client.run(put("1"), trace, mark("1", state))

    client.one(Prune(110.0))  # `updated` must be before it
    assert len(found(client, "1")) == 1

    client.one(Prune(110.5))
    ended = state in {CommandState.DELIVERED, CommandState.CLOSED, CommandState.EXPIRED, CommandState.DEAD}
    assert len(found(client, "1")) == (0 if ended else 1)


def test_pruning_leaves_the_outbox_alone(client: StoreClient) -> None:
    client.run(put("1"), mark("1", CommandState.EXPIRED), PutOutbox(KEY, "1", "r-1", RESULT))
    client.run(put("2"), PutResult(KEY, "2", RESULT, wall=110.0))
    client.one(Prune(1000.0))
    assert [entry.command_id for entry in outbox(client)] == ["1", "2"]
    assert state_of(client, "2") is CommandState.ANSWERED


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_command_is_found_by_its_id_with_result_and_trace(client: StoreClient) -> None:
    steps = [TraceEntry(100.0, "arrived", "exec"), TraceEntry(99.0, "offered"), TraceEntry(101.0, "result", "ok")]
    client.run(put("1"), put("2"), AddTrace(KEY, ("1",), steps[1]))
    client.run(PutResult(KEY, "1", RESULT, wall=101.0), AddTrace(KEY, ("1",), steps[2]))

    ((record, result, trace),) = found(client, "1")
    assert (record.id, record.state, result, trace) == ("1", CommandState.ANSWERED, RESULT, steps)
    assert found(client, "2")[0][1:] == (None, steps[:1])
    assert found(client, "3") == []


def test_the_arrival_of_a_command_is_traced_each_time(client: StoreClient) -> None:
    first, again, later = (TraceEntry(unix, "arrived", "exec") for unix in (100.0, 104.0, 105.0))
    for each in (put("1"), put("1", arrived_unix=104.0), mark("1", CommandState.OFFERED, 104.5)):
        client.one(each)
    client.one(put("1", arrived_unix=105.0))
    assert found(client, "1")[0][2] == [first, again, TraceEntry(104.5, "offered"), later]


@pytest.mark.parametrize("together", [False, True])
def test_a_command_may_be_stored_as_offered(client: StoreClient, reopen: Reopen, together: bool) -> None:
    step = TraceEntry(100.0, "offered", "attempt 1")
    offered = put("1", state=CommandState.OFFERED, attempts=1, offered=step)
    outcomes = [client.submit(each) for each in (put("0"), offered, put("2"))] if together else [[client.one(offered)]]
    assert not any(client.wait(each).duplicate for each in outcomes)
    assert found(client, "1")[0][2] == [TraceEntry(100.0, "arrived", "exec"), step]
    [record] = [each for each in reopen(client).open().commands if each.id == "1"]
    assert (record.state, record.attempts) == (CommandState.OFFERED, 1)


def test_a_duplicate_that_comes_as_offered_leaves_the_command_as_it_is(client: StoreClient) -> None:
    client.run(put("1"), mark("1", CommandState.DELIVERED))
    again = client.one(put("1", state=CommandState.OFFERED, attempts=1, offered=TraceEntry(120.0, "offered")))
    assert (again.duplicate, again.state) == (True, CommandState.DELIVERED)
    ((record, _, trace),) = found(client, "1")
    assert (record.state, record.attempts) == (CommandState.DELIVERED, 0)
    assert [step.event for step in trace] == ["arrived", "delivered", "arrived"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_long_trace_keeps_its_steps_in_order(client: StoreClient, at_once: bool) -> None:
    """More steps than a command's own row takes, and a duplicate and commands without a row among them."""
    first = TraceEntry(100.0, "arrived", "exec")
    steps = [TraceEntry(101.0 + number, "offered", f"'{number}\" \0, " + 60 * "ü") for number in range(40)]
    submitted: list[list[Operation]] = [[put("1")]]
    for number, step in enumerate(steps):
        change = MarkCommands(KEY, ("1", "2"), CommandState.OFFERED, step, 1)
        submitted.append([change if number % 2 else AddTrace(KEY, ("1", "2"), step)])
    submitted.append([put("1")])
    outcomes = [client.submit(*each) if at_once else [client.run(*each)] for each in submitted]
    duplicate = [client.wait(each) for each in outcomes][-1]

    ((record, _, trace),) = found(client, "1")
    assert (record.state, record.attempts) == (CommandState.OFFERED, 20)
    assert (duplicate.duplicate, duplicate.state) == (True, CommandState.OFFERED)
    assert shown(trace) == shown([first, *steps, first])
    assert shown(found(client, "2")[0][2]) == shown(steps)


def shown(trace: list[TraceEntry]) -> list[TraceEntry]:
    """Replace NUL in details as PostgreSQL's text columns do."""
    return [replace(step, detail=step.detail.replace("\0", "␀")) for step in trace]


def test_a_rejected_command_is_found_by_its_trace_until_that_is_old(client: StoreClient) -> None:
    steps = [TraceEntry(100.0, "reported", "queue_full"), TraceEntry(105.0, "closed")]
    client.run(*(AddTrace(OTHER, ("1",), step) for step in steps), put("2"))

    ((record, result, trace),) = found(client, "1")
    assert (record.session, record.id, record.seq, record.state) == (OTHER, "1", 0, CommandState.DEAD)
    assert (result, trace) == (None, steps)

    client.one(Prune(105.0))
    assert found(client, "1")[0][2] == steps[1:]
    client.one(Prune(106.0))
    assert found(client, "1") == []


def test_what_was_traced_before_the_command_was_stored_belongs_to_it(client: StoreClient) -> None:
    steps = [TraceEntry(100.0, "reported", "queue_full"), TraceEntry(110.0, "arrived", "exec")]
    client.run(AddTrace(KEY, ("1",), steps[0]), put("1", arrived_unix=110.0))
    assert [trace for _, _, trace in found(client, "1")] == [steps]


def test_a_command_is_looked_up_in_its_session_only(client: StoreClient) -> None:
    client.run(put("1"), PutResult(KEY, "1", RESULT, wall=120.0))
    known: PutOutcome = client.one(LookUpCommand(KEY, "1"))
    assert (known.duplicate, known.state, known.result) == (True, CommandState.ANSWERED, RESULT)
    assert client.one(LookUpCommand(OTHER, "1")) is None
    assert client.one(LookUpCommand(KEY, "2")) is None


def test_of_the_traces_of_refused_commands_the_newest_are_kept(make: Make) -> None:
    client = make()
    client.open()
    ids = tuple(f"refused-{n}" for n in range(MAX_LONE_TRACES + 2))
    client.run(AddTrace(KEY, ids, TraceEntry(100.0, "refused", "malformed")))
    assert [len(found(client, each)) for each in (ids[0], ids[1], ids[2], ids[-1])] == [0, 0, 1, 1]
    client.close()


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [s for s in CommandState if s not in {CommandState.ANSWERED, CommandState.CLOSED}])
def test_the_first_result_is_stored_in_every_state(client: StoreClient, state: CommandState) -> None:
    client.run(put("1"), mark("1", state))
    outcome: ResultOutcome = client.one(PutResult(KEY, "1", RESULT, wall=120.0))
    assert (outcome.known, outcome.state) == (True, state)
    assert outcome.entry is not None
    assert (outcome.entry.session, outcome.entry.command_id) == (KEY, "1")
    assert (outcome.entry.request_id, outcome.entry.payload) == ("r-1", RESULT)
    assert outbox(client) == [outcome.entry]
    assert state_of(client, "1") is CommandState.ANSWERED


def test_a_repeated_result_changes_nothing(client: StoreClient, reopen: Reopen) -> None:
    client.run(put("1"), PutResult(KEY, "1", RESULT, wall=120.0))
    before = outbox(client)
    repeat = PutResult(KEY, "1", {"success": False}, wall=130.0)
    assert client.one(repeat) == ResultOutcome(None, known=True, state=CommandState.ANSWERED)
    assert outbox(client) == before

    client = reopen(client)
    client.open()
    client.one(CloseOutbox((before[0].seq,), wall=140.0))
    assert client.one(repeat) == ResultOutcome(None, known=True, state=CommandState.CLOSED)
    assert found(client, "1")[0][1] == RESULT


def test_the_result_for_an_unknown_id_is_forwarded_once_and_says_so(client: StoreClient, reopen: Reopen) -> None:
    outcome: ResultOutcome = client.one(PutResult(KEY, "ghost", RESULT, wall=120.0))
    assert (outcome.known, outcome.state) == (False, None)
    assert outcome.entry is not None
    assert (outcome.entry.request_id, outcome.entry.payload) == ("", RESULT | {"code": "unknown_command"})
    assert outbox(client) == [outcome.entry]

    client = reopen(client)
    client.open()
    client.one(CloseOutbox((outcome.entry.seq,), wall=130.0))
    assert client.one(PutResult(KEY, "ghost", RESULT, wall=140.0)) == ResultOutcome(None, known=False)
    assert client.one(PutResult(OTHER, "ghost", RESULT, wall=140.0)).entry is not None

    client.one(Prune(120.5))
    assert client.one(PutResult(KEY, "ghost", RESULT, wall=150.0)).entry is not None


def test_a_command_that_comes_after_a_result_for_its_id_gets_its_own_result(client: StoreClient) -> None:
    client.one(PutResult(KEY, "1", RESULT, wall=90.0))
    assert not client.one(put("1")).duplicate
    outcome: ResultOutcome = client.one(PutResult(KEY, "1", RESULT, wall=120.0))
    assert outcome.known
    assert outcome.entry is not None
    assert "code" not in outcome.entry.payload


# --- outbox -----------------------------------------------------------------------------------------------------------


def test_the_outbox_is_read_in_order_by_owner_and_page(client: StoreClient, reopen: Reopen) -> None:
    sessions = (KEY, STRANGER, OTHER, KEY)
    entries = [client.one(PutOutbox(key, str(n), f"r{n}", {"n": n})) for n, key in enumerate(sessions)]
    mine = [entries[0], entries[2], entries[3]]
    assert outbox(client, limit=2) == mine[:2]
    assert outbox(client, after=mine[1].seq) == mine[2:]
    assert outbox(client, owner="0f0f") == [entries[1]]
    assert outbox(client, owner="nobody") == []

    client = reopen(client)
    assert client.open().outbox_owners == ("0f0f", "default")
    assert outbox(client) == mine


def test_closing_the_last_entry_closes_the_answered_command(client: StoreClient) -> None:
    client.run(put("1"), mark("1", CommandState.DEAD))
    failure: OutboxEntry = client.one(PutOutbox(KEY, "1", "r-1", {"code": "undeliverable"}))
    result: ResultOutcome = client.one(PutResult(KEY, "1", RESULT, wall=120.0))
    assert result.entry is not None

    client.one(CloseOutbox((failure.seq,), wall=130.0))
    assert state_of(client, "1") is CommandState.ANSWERED
    client.one(CloseOutbox((failure.seq, result.entry.seq, 999), wall=140.0))
    assert state_of(client, "1") is CommandState.CLOSED
    assert outbox(client) == []


def test_closing_a_failure_leaves_the_state_of_its_command(client: StoreClient) -> None:
    client.run(put("1"), mark("1", CommandState.EXPIRED))
    failure: OutboxEntry = client.one(PutOutbox(KEY, "1", "r-1", {"code": "expired"}))
    client.one(CloseOutbox((failure.seq,), wall=130.0))
    assert state_of(client, "1") is CommandState.EXPIRED


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_sessions_aliases_and_tunnels_are_kept_and_replaced(client: StoreClient, reopen: Reopen) -> None:
    final = session(registration={"name": "b"}, superseded_by=str(OTHER), last_seen_unix=7.25)
    client.run(SaveSession(session()), SaveSession(session(OTHER)), SaveSession(final))
    client.run(SaveAlias("default", "pod-1", OTHER), SaveAlias("default", "pod-1", KEY), SaveAlias("x", "pod-1", OTHER))
    client.run(SaveTunnel(KEY, {"status": "IDLE"}), SaveTunnel(KEY, {"status": "ACTIVE"}))

    loaded = reopen(client).open()
    assert loaded.sessions == (session(OTHER), final)
    assert loaded.aliases == (("default", "pod-1", KEY), ("x", "pod-1", OTHER))
    assert loaded.tunnels == ((KEY, {"status": "ACTIVE"}),)


def test_deleting_a_session_deletes_its_aliases_and_tunnel_only(client: StoreClient, reopen: Reopen) -> None:
    client.run(SaveSession(session()), SaveSession(session(OTHER)), put("1"), put("2", OTHER))
    client.run(SaveAlias("default", "pod-1", KEY), SaveAlias("default", "pod-2", OTHER), SaveTunnel(KEY, {"a": 1}))
    client.run(PutOutbox(KEY, "1", "r-1", {"code": "expired"}), DeleteSession(KEY))

    client = reopen(client)
    loaded = client.open()
    assert [record.key for record in loaded.sessions] == [OTHER]
    assert loaded.aliases == (("default", "pod-2", OTHER),)
    assert loaded.tunnels == ()
    assert len(outbox(client)) == 1


def test_moving_a_session_takes_everything_along_to_the_new_owner(client: StoreClient, reopen: Reopen) -> None:
    step = TraceEntry(100.0, "arrived", "exec")
    client.run(SaveSession(session()), SaveAlias("default", "pod-1", KEY), SaveTunnel(KEY, {"a": 1}))
    client.run(put("1"), AddTrace(KEY, ("rejected",), step), PutOutbox(KEY, "1", "r-1", {"n": 1}))
    client.one(PutResult(KEY, "ghost", RESULT, wall=100.0))
    client.one(MoveSession(KEY, STRANGER))

    assert outbox(client) == []
    assert [entry.session for entry in outbox(client, owner="0f0f")] == [STRANGER, STRANGER]
    assert [(record.session, trace) for record, _, trace in found(client, "1")] == [(STRANGER, [step])]
    assert [(record.session, trace) for record, _, trace in found(client, "rejected")] == [(STRANGER, [step])]
    assert client.one(PutResult(STRANGER, "ghost", RESULT, wall=101.0)).entry is None

    loaded = reopen(client).open()
    assert loaded.sessions == ()
    assert loaded.aliases == (("0f0f", "pod-1", STRANGER),)
    assert loaded.tunnels == ((STRANGER, {"a": 1}),)
    assert [record.session for record in loaded.commands] == [STRANGER]


def test_where_both_sessions_have_something_the_targets_stands(client: StoreClient, reopen: Reopen) -> None:
    client.run(SaveSession(session()), SaveSession(session(OTHER)))
    client.run(SaveTunnel(KEY, {"from": "source"}), SaveTunnel(OTHER, {"from": "target"}))
    client.run(put("1", payload={"from": "source"}), AddTrace(KEY, ("1",), TraceEntry(1.0, "source")), put("2"))
    client.run(put("1", OTHER, payload={"from": "target"}), AddTrace(OTHER, ("1",), TraceEntry(2.0, "target")))
    client.one(MoveSession(KEY, OTHER))

    [(record, _, trace)] = found(client, "1")
    assert (record.payload, [step.event for step in trace]) == ({"from": "target"}, ["arrived", "target"])
    loaded = reopen(client).open()
    assert [(record.session, record.id) for record in loaded.commands] == [(OTHER, "2"), (OTHER, "1")]
    assert [record.key for record in loaded.sessions] == [OTHER]
    assert loaded.tunnels == ((OTHER, {"from": "target"}),)


def test_moving_between_owners_never_replaces_an_alias_of_the_new_owner(client: StoreClient, reopen: Reopen) -> None:
    third = STRANGER._replace(ident="c-3")
    client.run(SaveAlias("default", "pod-1", KEY), SaveAlias("0f0f", "pod-1", third), MoveSession(KEY, STRANGER))
    assert reopen(client).open().aliases == (("0f0f", "pod-1", third),)


def test_moving_a_session_onto_itself_loses_nothing(client: StoreClient, reopen: Reopen) -> None:
    client.run(SaveSession(session()), put("1"), SaveAlias("default", "pod-1", KEY), MoveSession(KEY, KEY))
    loaded = reopen(client).open()
    assert (len(loaded.sessions), len(loaded.commands), len(loaded.aliases)) == (1, 1, 1)


# --- the store itself -------------------------------------------------------------------------------------------------


def test_the_key_is_random_and_stays(client: StoreClient, reopen: Reopen) -> None:
    again = reopen(client)
    key = again.open().key
    assert len(key) == 32
    assert reopen(again).open().key == key


@pytest.mark.parametrize("poison", POISON)
def test_a_submission_that_cannot_be_stored_fails_as_a_whole(client: StoreClient, poison: Operation) -> None:
    with pytest.raises(StoreError) as failure:
        client.run(put("1"), poison, put("2"))
    assert "poison" not in str(failure.value)
    assert found(client, "1") == []
    assert not client.one(put("2")).duplicate


def test_outcomes_come_in_the_order_of_submission(client: StoreClient) -> None:
    order: list[int] = []

    def done(number: int, outcome: object) -> None:
        order.append(number)

    for n in range(500):
        client.store.submit(POISON[0] if n % 50 == 7 else put(str(n)), done=partial(done, n))
    client.run(put("last"))
    assert order == list(range(500))


def test_a_store_that_is_not_open_says_so(client: StoreClient, make: Make) -> None:
    client.close()
    client.close()
    with pytest.raises(StoreError):
        client.run(put("1"))

    unopened = make()
    with pytest.raises(StoreError):
        unopened.run(put("1"))
    unopened.store.submit(put("1"))
    unopened.close()


def test_touching_shows_that_the_store_can_be_written(client: StoreClient) -> None:
    assert client.run(WriteProbe(1.0), WriteProbe(2.0)) is None


def test_a_submission_may_come_without_a_callback(client: StoreClient) -> None:
    client.store.submit(put("1"))
    assert client.one(put("1")).duplicate
