"""What the controller keeps: history, journal, registrations, commands."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devtools.controller.commands import CommandLog
from devtools.controller.history import EventKind, History, HistoryFile, mask, masked
from devtools.controller.registry import Registry
from devtools.controller.state import Tokens, bearer
from shim.clock import Clock
from shim.protocol.upstream_message import Message


def _history(journal: HistoryFile | None = None, *, max_events: int = 100, max_bytes: int = 10_000_000) -> History:
    return History(Clock(), max_events=max_events, max_bytes=max_bytes, journal=journal)


def _payload(agent_id: str = "a", name: str = "c", **more: str) -> dict[str, str]:
    return {"agent_id": agent_id, "name": name, **more}


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_is_bounded_by_number() -> None:
    history = _history(max_events=3)
    for _ in range(10):
        history.record(EventKind.PING_SENT)
    assert [event.n for event in history.after(0)] == [8, 9, 10]
    assert (history.first_n, history.last_n) == (8, 10)
    assert [event.n for event in history.after(8, limit=1)] == [9]
    assert history.after(10) == []


def test_history_is_bounded_by_size() -> None:
    history = _history(max_bytes=5000)
    for _ in range(10):
        history.record(EventKind.RECEIVED, 1, Message("status"), size_bytes=2000)
    assert len(history.after(0)) == 2
    history.record(EventKind.RECEIVED, 1, Message("status"), size_bytes=1_000_000)
    assert history.after(0) == []
    assert history.first_n == history.last_n + 1


async def test_wait_for_finds_past_and_coming_events() -> None:
    history = _history()
    history.record(EventKind.RECEIVED, 1, Message("past"))
    past = await history.wait_for(lambda event: event.type == "past")
    waiting = asyncio.create_task(history.wait_for(lambda event: event.type == "coming", after=past.n))
    for kind in ("past", "other", "coming"):
        history.record(EventKind.RECEIVED, 1, Message(kind))
    assert (await waiting).n == 4
    with pytest.raises(TimeoutError, match=r"the latest events were: .*received coming"):
        await history.wait_for(lambda event: event.type == "past", after=2, timeout_s=0.02)
    with pytest.raises(TimeoutError, match="none"):
        await _history().wait_for(lambda _event: True, timeout_s=0.01)


def test_listeners_are_told() -> None:
    history = _history()
    seen: list[int] = []
    history.listeners.append(lambda event: seen.append(event.n))
    history.record(EventKind.STARTED)
    assert seen == [1]


# --- journal ----------------------------------------------------------------------------------------------------------


def test_journal_has_each_event_before_record_returns(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with closing(HistoryFile(path)) as journal:
        message = Message("heartbeat", {"token": "secret"}, "r-1")
        _history(journal).record(EventKind.RECEIVED, 7, message, frame="text", size_bytes=9)
    (line,) = path.read_text().splitlines()
    event = json.loads(line)
    assert event["payload"] == {"token": masked("secret")}
    assert {key: event[key] for key in ("n", "kind", "direction", "connection", "type", "request_id", "frame")} == {
        "n": 1,
        "kind": "received",
        "direction": "in",
        "connection": 7,
        "type": "heartbeat",
        "request_id": "r-1",
        "frame": "text",
    }


@pytest.mark.parametrize("tail", ["", '{"n":3,"kind":"rec', '{"n":3,"kind":"rec\n', "null\n", '{"n":"x"}\n[]\n'])
def test_journal_goes_on_where_a_killed_run_ended(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "journal.jsonl"
    with closing(HistoryFile(path)) as journal:
        first = _history(journal)
        first.record(EventKind.STARTED)
        first.record(EventKind.STOPPED)
    with path.open("a") as file:
        file.write(tail)
    with closing(HistoryFile(path)) as journal:
        second = _history(journal)
        assert second.record(EventKind.STARTED).n == 3
    assert json.loads(path.read_text().splitlines()[-1])["n"] == 3
    assert second.after(0)[0].n == 3


def test_journal_of_nothing_but_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("rubbish")
    for _ in range(2):
        with closing(HistoryFile(path)) as journal:
            assert journal.last_n == 0


# --- registry ---------------------------------------------------------------------------------------------------------


def test_ids_follow_from_owner_and_name() -> None:
    one, two = Registry(Clock()), Registry(Clock())
    ids = {one.register(owner, _payload(name=name))[0].cluster_id for owner in ("aa0000", "bb0000") for name in "xy"}
    assert len(ids) == 4
    assert two.register("aa0000", _payload(name="x"))[0].cluster_id in ids


def test_registrations_survive_with_a_state_file(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    first = Registry(Clock(), path)
    kept, _ = first.register("aa0000", _payload("agent-1", "kept"))
    gone, _ = first.register("aa0000", _payload("agent-2", "gone"))
    renewed, _ = first.register("aa0000", _payload("agent-3", "kept"), new_id=True)
    first.register("aa0000", _payload("agent-4", "kept", cluster_id=kept.cluster_id))
    assert first.forget(cluster_id=gone.cluster_id) == [gone.cluster_id]
    first.close()
    with path.open("a") as file:
        file.write('{"owner":"torn')

    second = Registry(Clock(), path)
    assert {c.cluster_id: c.agent_id for c in second.all()} == {
        renewed.cluster_id: "agent-3",
        kept.cluster_id: "agent-4",
    }
    again, known = second.register("aa0000", _payload("agent-3", "kept"))
    assert (again.cluster_id, known) == (renewed.cluster_id, True), "the generation survives as well"
    assert again.registered_at == renewed.registered_at
    second.close()


def test_state_after_a_torn_line_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    path.write_bytes(b'{"torn')
    with closing(Registry(Clock(), path)) as first:
        first.register("aa0000", _payload())
    with closing(Registry(Clock(), path)) as second:
        assert len(second.all()) == 1


def test_lookups() -> None:
    registry = Registry(Clock())
    old, _ = registry.register("aa0000", _payload("agent-1", "one"))
    new, _ = registry.register("aa0000", _payload("agent-1", "two"))
    assert registry.by_agent("agent-1") == new, "the latest"
    registry.register("aa0000", _payload("agent-9", "one"))
    assert registry.by_uuid(old.cluster_uuid).agent_id == "agent-9"
    assert registry.by_uuid(new.cluster_id) == new
    assert registry.by_uuid("nobody") is None
    assert registry.by_agent("nobody") is None
    assert registry.forget(agent_id="nobody") == []
    assert len(registry.forget()) == 2
    assert registry.all() == []


# --- commands, tokens, masks ------------------------------------------------------------------------------------------


def test_command_book_is_bounded() -> None:
    book = CommandLog()
    for number in range(100_005):
        book.pushed(f"c-{number}", "test", f"r-{number}")
    assert book.get("c-4") is None
    assert book.get("c-5") is not None
    history = _history()
    assert not book.answered(history.record(EventKind.RECEIVED, 1, Message("command_result", {}, "r-4")))
    assert book.answered(history.record(EventKind.RECEIVED, 1, Message("command_result", {}, "r-5")))


@pytest.mark.parametrize("named", [None, "", [], {}, 1.5])
def test_answer_that_names_no_command(named: object) -> None:
    event = _history().record(EventKind.RECEIVED, 1, Message("command_result", {"command_id": named}))
    assert not CommandLog().answered(event)


def test_tokens() -> None:
    tokens = Tokens(["good", ""], ["pre-", ""])
    assert tokens.owner_of("good") != tokens.owner_of("pre-1") != tokens.owner_of("pre-2")
    for bad in ("", "goo", "goodd", "pre", "\udcff"):
        assert tokens.owner_of(bad) is None
    assert "good" not in str(tokens.owner_of("good"))


@pytest.mark.parametrize(
    "header, token", [("Bearer x", "x"), ("bearer  x ", "x"), ("Basic x", ""), ("Bearer", ""), ("", "")]
)
def test_bearer(header: str, token: str) -> None:
    assert bearer(header) == token


_JSON = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["token", "k8s_service_token", "prometheus_password", "password", "name", "list"]), inner
))  # fmt: skip


@given(_JSON)
def test_masking_hides_every_secret_and_nothing_else(value: object) -> None:
    def check(before: object, after: object, key: str = "") -> None:
        secret = key.endswith(("token", "password")) and isinstance(before, str) and before
        if secret:
            assert after == masked(str(before))
        elif isinstance(before, dict):
            assert isinstance(after, dict)
            assert list(before) == list(after)
            for name, held in before.items():
                check(held, after[name], name)
        elif isinstance(before, list):
            assert isinstance(after, list)
            for left, right in zip(before, after, strict=True):
                check(left, right)
        else:
            assert after == before

    check(value, mask(value))
