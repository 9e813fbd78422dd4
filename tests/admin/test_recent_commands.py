"""The latest commands, as they go by on their way to the store."""

from __future__ import annotations

from shim.admin.recent_commands import KEPT, RecentCommandsStore
from shim.core.records import AddTrace, TraceEntry
from shim.store.memory import MemoryStore
from tests.support.stores import KEY, OTHER, StoreClient, put


def step(command_id: str, event: str, wall: float, detail: str = "") -> AddTrace:
    return AddTrace(KEY, (command_id,), TraceEntry(wall, event, detail))


def test_everything_reaches_the_store_and_its_answers_come_back() -> None:
    client = StoreClient(lambda post: RecentCommandsStore(MemoryStore(post)))
    client.open()
    outcome = client.run(put("1"), step("1", "arrived", 1.0, "exec"))
    assert outcome[0].seq == 1
    client.close()
    assert client.open().commands[0].id == "1"
    client.close()


def test_a_command_is_shown_once_with_its_newest_step_the_newest_first() -> None:
    client = StoreClient(lambda post: RecentCommandsStore(MemoryStore(post)))
    client.open()
    client.run(
        step("1", "arrived", 1.0, "exec"), step("2", "arrived", 2.0, "scan"), step("1", "offered", 3.0, "attempt 1")
    )
    client.run(AddTrace(OTHER, ("1",), TraceEntry(4.0, "dead", "why")))
    journal = client.store
    assert isinstance(journal, RecentCommandsStore)
    assert [(each.id, each.session, each.event, each.type, each.arrived_unix) for each in journal] == [
        ("1", OTHER, "dead", "", 0.0),
        ("1", KEY, "offered", "exec", 1.0),
        ("2", KEY, "arrived", "scan", 2.0),
    ]
    client.close()


def test_only_so_many_are_kept_also_of_one_batch() -> None:
    client = StoreClient(lambda post: RecentCommandsStore(MemoryStore(post)))
    client.open()
    client.run(AddTrace(KEY, tuple(map(str, range(3 * KEPT))), TraceEntry(1.0, "offered")))
    client.run(step("last", "arrived", 2.0))
    journal = client.store
    assert isinstance(journal, RecentCommandsStore)
    shown = [each.id for each in journal]
    assert (len(shown), shown[:2]) == (KEPT, ["last", str(3 * KEPT - 1)])
    client.close()
