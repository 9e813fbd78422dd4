"""Any sequence of operations has the same results on SQLite, and on PostgreSQL, as in the model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings as search
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from msgspec.structs import replace

from shim.core.records import (
    AddTrace,
    CheckStore,
    CloseOutbox,
    CommandDetails,
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
from shim.store.sqlite import SqliteStore
from tests.support.memory_store import MemoryStore
from tests.support.stores import KEY, OTHER, POISON, STRANGER, StoreClient, put, session

keys = st.sampled_from((KEY, OTHER, STRANGER))
ids = st.sampled_from(("1", "2", "3", "ü/"))
some_ids = st.lists(ids, max_size=3).map(tuple)
walls = st.integers(90, 110).map(float)
states = st.sampled_from(CommandState)
payloads = st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2)
# PostgreSQL keeps no NUL in texts: another character stands for it.
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3)
entries = st.builds(TraceEntry, walls, words, words)

operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(
        put, ids, keys, st.none() | entries, payload=payloads, arrived_unix=walls, via=st.sampled_from(("", "http"))
    ),
    st.builds(MarkCommands, keys, some_ids, states, entries, st.integers(-1, 1)),
    st.builds(RequeueCommand, keys, ids, walls, walls),
    st.builds(PutResult, keys, ids, payloads, walls),
    st.builds(PutOutbox, keys, ids, ids, payloads),
    st.builds(CloseOutbox, st.lists(st.integers(0, 12), max_size=4).map(tuple), walls),
    st.builds(ReadOutbox, st.sampled_from(("default", "0f0f")), st.integers(0, 12), st.integers(0, 3)),
    st.builds(SaveSession, st.builds(session, keys, registration=payloads, last_seen_unix=walls)),
    st.builds(DeleteSession, keys),
    st.builds(MoveSession, keys, keys),
    st.builds(SaveAlias, st.sampled_from(("default", "0f0f")), ids, keys),
    st.builds(SaveTunnel, keys, payloads),
    st.builds(AddTrace, keys, some_ids, entries),
    st.builds(Prune, walls),
    st.builds(WriteProbe, walls),
    st.just(CheckStore()),
    st.builds(FindCommand, ids),
    st.builds(LookUpCommand, keys, ids),
)


class Names:
    """The numbers that a store has given, each named by how many came before it."""

    def __init__(self) -> None:
        self.commands: dict[int, int] = {}
        self.entries: dict[int, int] = {}

    def numbered(self, operation: Operation) -> Operation:
        """The operation with the store's numbers for the names of outbox entries; what is not there yet has none."""
        numbers = {name: number for number, name in self.entries.items()}
        if isinstance(operation, CloseOutbox):
            return CloseOutbox(tuple(numbers.get(each, 1_000_000 + each) for each in operation.seqs), operation.wall)
        if isinstance(operation, ReadOutbox):
            return ReadOutbox(operation.owner, numbers.get(operation.after, 0), operation.limit)
        return operation


class Comparison(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._make = self._place()
        self._model = StoreClient(MemoryStore)
        self._real_names, self._model_names = Names(), Names()
        self._open_both()

    def _place(self) -> Callable[[], StoreClient]:
        """Where the store is; gone with `self._stack`."""
        path = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "shim.db"
        return lambda: StoreClient(lambda post: SqliteStore(path, post))

    def _open_both(self) -> None:
        self._real = self._make()
        real, model = self._real.open(), self._model.open()
        assert self._names(real.commands, self._real_names) == self._names(model.commands, self._model_names)
        assert replace(real, key=b"", commands=()) == replace(model, key=b"", commands=())

    def _names(self, outcome: Any, names: Names) -> Any:
        """The outcome with numbers replaced by names, because a store may leave numbers out."""
        if isinstance(outcome, StoreError):
            return "failed"
        if isinstance(outcome, (PutOutcome, CommandRecord)):
            return replace(
                outcome, seq=names.commands.setdefault(outcome.seq, len(names.commands)) if outcome.seq else -1
            )
        if isinstance(outcome, OutboxEntry):
            return replace(outcome, seq=names.entries.setdefault(outcome.seq, len(names.entries)))
        if isinstance(outcome, CommandDetails):
            return outcome._replace(record=self._names(outcome.record, names))
        if isinstance(outcome, ResultOutcome):
            return replace(outcome, entry=self._names(outcome.entry, names))
        if type(outcome) in {list, tuple}:
            return [self._names(each, names) for each in outcome]
        return outcome

    @rule(submission=st.lists(operations, min_size=1, max_size=4))
    def one_submission(self, submission: list[Operation]) -> None:
        self._compare([submission])

    @rule(
        submissions=st.lists(
            st.lists(operations | st.sampled_from(POISON), min_size=1, max_size=3), min_size=1, max_size=4
        ),
    )
    def several_at_once_some_of_them_poisoned(self, submissions: list[list[Operation]]) -> None:
        self._compare(submissions)

    def _compare(self, submissions: list[list[Operation]]) -> None:
        outcomes = [
            (
                self._real.submit(*map(self._real_names.numbered, each)),
                self._model.submit(*map(self._model_names.numbered, each)),
            )
            for each in submissions
        ]
        for real, model in outcomes:
            found = self._names(self._real.wait(real), self._real_names)
            assert found == self._names(self._model.wait(model), self._model_names)

    @rule()
    def restart(self) -> None:
        self._real.close()
        self._model.close()
        self._open_both()

    def teardown(self) -> None:
        self._real.close()
        self._stack.close()


class PostgresComparison(Comparison):
    server: ClassVar[Any] = None

    def _place(self) -> Callable[[], StoreClient]:
        from tests.support import postgres  # noqa: PLC0415 - the driver is an extra

        url = self.server.create()
        return lambda: StoreClient(lambda post: postgres.store(url, post))


TestComparison = Comparison.TestCase
TestComparison.settings = search(max_examples=40, stateful_step_count=25)


@pytest.fixture
def on_postgres(postgres: Any) -> None:
    PostgresComparison.server = postgres


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("on_postgres")
class TestPostgresComparison(PostgresComparison.TestCase):  # type: ignore[misc, valid-type]
    settings = search(max_examples=4, stateful_step_count=25, deadline=None)
