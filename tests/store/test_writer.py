"""The writer thread: shared commits, failures that stay alone, and databases that refuse for a while."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shim.config import settings
from shim.core.records import FindCommand, MoveSession, Operation, PutOutcome
from shim.errors import StoreError
from shim.store import CommitProbe, open_store
from shim.store.sqlite import SqliteStore
from shim.store.writer import LARGE_BATCH, MAX_BATCH, SHORT_SWITCH_INTERVAL_S, SWITCH_INTERVAL_S, QueuedStore
from tests.store.conftest import Gate
from tests.support.stores import KEY, OTHER, POISON, TIMEOUT_S, StoreClient, put


def test_submissions_that_wait_share_one_commit(gated: StoreClient, gate: Gate) -> None:
    outcomes = [gated.submit(put(str(n)), put(f"{n}b")) for n in range(250)]
    gate.open()
    assert all(isinstance(gated.wait(outcome), PutOutcome) for outcome in outcomes)
    # The time of the commits themselves: each batch reads the clock twice.
    assert gate.commits == [(1.5, 1), (1.5, 500)]


def test_no_commit_is_shared_by_more_than_the_batch_allows(gated: StoreClient, gate: Gate) -> None:
    """Else what an agent posts during a flood would wait for all of the flood to be committed."""
    outcomes = [gated.submit(put(str(n))) for n in range(3 * MAX_BATCH)]
    gate.open()
    assert all(isinstance(gated.wait(outcome), PutOutcome) for outcome in outcomes)
    assert [operations for _, operations in gate.commits] == [1, MAX_BATCH, MAX_BATCH, MAX_BATCH]


def test_the_interpreter_changes_hands_more_often_only_during_a_large_batch(gated: StoreClient, gate: Gate) -> None:
    """Else each statement of it waits 5 ms for a busy event loop; for a small one the shorter interval costs more."""
    outcomes = [gated.submit(put(str(n))) for n in range(LARGE_BATCH + 1)]
    gate.open()
    assert all(isinstance(gated.wait(outcome), PutOutcome) for outcome in outcomes)
    gated.run(put("last"))
    usual, short = pytest.approx(SWITCH_INTERVAL_S), pytest.approx(SHORT_SWITCH_INTERVAL_S)
    # Each batch reads the clock twice.
    assert gate.switch_intervals_s[::2] == [usual, short, usual]


async def test_outcomes_of_a_flood_leave_the_loop_to_others_in_between(path: Path) -> None:
    loop = asyncio.get_running_loop()
    store = open_store(settings.Store(path=str(path)), loop.call_soon_threadsafe)
    store.open()
    turn, told_in = 0, Counter[int]()
    told = asyncio.Event()

    def count_turns() -> None:
        nonlocal turn
        turn += 1
        if not told.is_set():
            loop.call_soon(count_turns)

    def done(_outcome: object) -> None:
        told_in[turn] += 1
        if told_in.total() == 1000:
            told.set()

    loop.call_soon(count_turns)
    for n in range(1000):
        store.submit(put(str(n)), done=done)
    async with asyncio.timeout(TIMEOUT_S):
        await told.wait()
    store.close()
    assert max(told_in.values()) <= 64


@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_submission_fails_alone(gated: StoreClient, gate: Gate, poison: Any) -> None:
    before = [gated.submit(put(f"before-{n}")) for n in range(500)]
    bad = gated.submit(put("beside"), poison)
    after = [gated.submit(put("before-0"), put(f"after-{n}")) for n in range(499)]
    gate.open()
    assert all(isinstance(gated.wait(outcome), PutOutcome) for outcome in before)
    assert isinstance(gated.wait(bad), StoreError)
    assert all(gated.wait(outcome).duplicate for outcome in after)
    assert gated.one(FindCommand("beside")) == []
    assert sum(operations for _, operations in gate.commits) == 1 + 500 + 998 + 1
    assert len(gate.commits) < 15
    assert all(len(gated.one(FindCommand(f"after-{n}"))) == 1 for n in (0, 498))


class Interrupted:
    """An engine in front of another: raises the given exceptions instead of moving sessions, or of rolling back."""

    def __init__(self, client: StoreClient) -> None:
        assert isinstance(client.store, QueuedStore)
        assert client.store._writer is not None
        self._engine = client.store._writer._engine
        self.at_move: list[Exception] = []
        self.at_roll_back: list[Exception] = []
        self.close, self.failure = self._engine.close, self._engine.failure
        client.store._writer._engine = self

    def commit(self, batch: Sequence[Sequence[Operation]]) -> list[Any]:
        if self.at_move and any(isinstance(operations[0], MoveSession) for operations in batch):
            raise self.at_move.pop()
        return self._engine.commit(batch)

    def roll_back(self) -> None:
        if self.at_roll_back:
            raise self.at_roll_back.pop()
        self._engine.roll_back()


def test_a_move_for_which_memory_is_short_is_repeated(client: StoreClient) -> None:
    client.run(put("1"))
    engine = Interrupted(client)
    engine.at_move = [MemoryError() for _ in range(3)]
    moving = client.submit(MoveSession(KEY, OTHER))
    assert str(client.wait(moving)) == "it cannot be stored: MemoryError"
    with pytest.raises(StoreError, match="MemoryError"):
        client.run(put("2"))
    client.run(put("2", session=OTHER))
    assert [found.record.session for command_id in "12" for found in client.one(FindCommand(command_id))] == [OTHER] * 2


def test_a_move_that_a_defect_keeps_from_the_disk_is_logged(
    client: StoreClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.run(put("1"))
    Interrupted(client).at_move = [KeyError("a defect")]
    assert isinstance(client.wait(client.submit(MoveSession(KEY, OTHER))), StoreError)
    assert [record.message for record in caplog.records] == ["session_not_moved"]
    assert not client.one(put("2")).duplicate


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_an_exception_ends_is_reported_as_a_broken_store(path: Path) -> None:
    """Nobody would answer a submission: the process ends."""
    broken: list[StoreError] = []
    client = StoreClient(lambda post: SqliteStore(path, post, CommitProbe(corrupt=broken.append)))
    client.open()
    client.run(put("1"))
    engine = Interrupted(client)
    engine.at_move, engine.at_roll_back = [MemoryError()], [MemoryError()]
    client.submit(MoveSession(KEY, OTHER))
    client.wait(broken)
    assert str(broken[0]) == "the thread of the store has ended: MemoryError"
    client.close()


def test_a_callback_that_fails_keeps_the_outcome_from_nobody(gated: StoreClient, gate: Gate) -> None:
    def fails(outcome: object) -> None:
        raise ValueError("in a callback")

    gated.store.submit(put("1"), done=fails)
    later = gated.submit(put("2"))
    gate.open()
    with pytest.raises(ExceptionGroup) as raised:
        gated.wait(later)
    assert [str(error) for error in raised.value.exceptions] == ["in a callback"]
    assert isinstance(later[0], PutOutcome)


def test_closing_carries_out_what_was_submitted(gated: StoreClient, gate: Gate, path: Path) -> None:
    outcomes = [gated.submit(put(str(n))) for n in range(20)]
    gate.open()
    gated.close()
    late = gated.submit(put("late"))
    gated.drain()
    assert all(isinstance(outcome[0], PutOutcome) for outcome in outcomes)
    assert isinstance(late[0], StoreError)

    again = StoreClient(lambda post: SqliteStore(path, post))
    assert len(again.open().commands) == 21
    again.close()


async def test_outcomes_arrive_on_the_event_loop(path: Path) -> None:
    loop = asyncio.get_running_loop()
    store = open_store(settings.Store(path=str(path)), loop.call_soon_threadsafe)
    store.open()
    arrived: asyncio.Queue[tuple[int, threading.Thread]] = asyncio.Queue()
    for n in range(300):
        store.submit(put(str(n)), done=lambda outcome: arrived.put_nowait((outcome.seq, threading.current_thread())))  # type: ignore[index]
    async with asyncio.timeout(TIMEOUT_S):
        assert [await arrived.get() for _ in range(300)] == [(n, threading.current_thread()) for n in range(1, 301)]
    store.close()


def test_a_closed_loop_does_not_stop_the_writer(path: Path) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    store = open_store(settings.Store(path=str(path)), loop.call_soon_threadsafe)
    store.open()
    for n in range(300):
        store.submit(put(str(n)), done=lambda outcome: None)
    store.close()
    store.submit(put("late"), done=lambda outcome: None)

    again = StoreClient(lambda post: SqliteStore(path, post))
    assert len(again.open().commands) == 300
    again.close()
