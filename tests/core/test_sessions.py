"""Sessions: whether an agent is alive, and which one is meant.

Rules: docs/reference/protocol.md#16-owners-sessions-aliases, #21-link-life.
"""

from __future__ import annotations

import tracemalloc
from statistics import median
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.core.agent_calls import HeartbeatCall, Registered, SessionTarget, TargetKind
from shim.core.bounds import FREE_KEPT_BYTES, MAX_ALL_KEPT_BYTES, MAX_KEPT_BYTES
from shim.core.records import SessionKey
from shim.core.sessions import Session, Sessions

OWNER, OTHER = "default", "0f0f"
GAPS = st.lists(st.floats(0, 600), max_size=20)


def cluster(ident: str, owner: str = OWNER, **fields: Any) -> Session:
    return _with(Session(SessionKey(owner, "cluster", ident), "clusters_agent"), fields)


def agent(ident: str, owner: str = OWNER, **fields: Any) -> Session:
    return _with(Session(SessionKey(owner, "agent", ident), "agents"), fields)


def _with(session: Session, fields: dict[str, Any]) -> Session:
    for name, value in fields.items():
        setattr(session, name, value)
    return session


def beat(session: Session, now: float, status: str = "healthy", tunnel: str = "connected", **more: Any) -> None:
    session.touch(now, now)
    session.record_heartbeat(
        HeartbeatCall("clusters_agent", SessionTarget(TargetKind.CLUSTER, "c-1"), "pod-1", status, tunnel, **more), now
    )


# --- freshness --------------------------------------------------------------------------------------------------------


@given(GAPS)
def test_fresh_for_one_and_a_half_intervals_but_at_least_35_s(gaps: list[float]) -> None:
    session, now = cluster("c-1"), 50.0
    for gap in [0.0, *gaps]:
        now += gap
        beat(session, now)
    measured = [b - a for a, b in zip(_times(gaps), _times(gaps)[1:], strict=False)][-8:]
    interval_s = median(measured) if len(measured) >= 3 else 30.0
    assert session.interval_s == pytest.approx(interval_s)
    bound_s = max(1.5 * interval_s, 35.0)
    assert session.fresh(now + bound_s - 0.001)
    assert not session.fresh(now + bound_s + 0.001)


def _times(gaps: list[float]) -> list[float]:
    times = [50.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    return times


def test_any_contact_counts_but_only_heartbeats_measure_the_interval() -> None:
    session = cluster("c-1")
    for now in (0.0, 5.0, 10.0, 15.0):
        beat(session, now)
    session.touch(100.0, 100.0)
    assert session.fresh(134.9)
    assert session.interval_s == 5.0


def test_what_was_loaded_from_disk_is_not_fresh() -> None:
    before = cluster("c-1", agent_id="pod-1", upstream_cluster_id="up", registration={"name": "prod"}, secret="s")
    before.touch(0.0, 1000.0)
    before.superseded_by = SessionKey(OWNER, "cluster", "c-2")
    record = before.record()
    assert "s" not in record.registration.values()
    session = Session.from_record(record)
    assert not session.fresh(0.0)
    assert session.record() == record
    assert session.secret == ""


def test_a_held_poll_is_life_for_as_long_as_it_is_open() -> None:
    session = cluster("c-1")
    session.touch(0.0, 0.0)
    session.held = 1
    assert session.fresh(10_000.0)
    session.held = 0
    assert not session.fresh(10_000.0)


# --- heartbeats and registrations -------------------------------------------------------------------------------------


def test_heartbeats_are_due_when_old_enough_or_when_their_words_change() -> None:
    session = cluster("c-1")
    beat(session, 0.0)
    assert session.heartbeat_due(0.0, 27.5)
    session.sent_at, session.last_sent_status = 0.0, session.reported_status
    assert not session.heartbeat_due(27.4, 27.5)
    assert session.heartbeat_due(27.5, 27.5)
    beat(session, 5.0, status="unhealthy")
    assert session.heartbeat_due(5.0, 27.5)
    session.last_sent_status = session.reported_status
    beat(session, 10.0, status="unhealthy", tunnel="disconnected")
    assert session.heartbeat_due(10.0, 27.5)


def test_heartbeat_payload_is_what_the_newest_said() -> None:
    session = cluster("c-1", upstream_cluster_id="up-1")
    beat(session, 0.0, payload={"metadata": {"k8s_nodes": 3}, "prometheus_url": "http://p"})
    assert session.heartbeat_payload() == {
        "cluster_id": "up-1",
        "agent_id": "pod-1",
        "status": "healthy",
        "tunnel_status": "connected",
        "metadata": {"k8s_nodes": 3},
        "prometheus_url": "http://p",
    }


def test_an_agent_that_only_polls_has_no_status_to_tell() -> None:
    payload = agent("a-1").heartbeat_payload()
    assert payload == {"cluster_id": "", "agent_id": "a-1", "tunnel_status": "disconnected", "metadata": {}}


def test_register_payload_prefers_what_the_agent_said_itself() -> None:
    session = cluster("c-1", agent_id="pod-2", registration={"name": "prod", "region": "eu"}, secret="sa")
    session.known = {"name": "known", "agent_version": "1.2"}
    identity = {"name": "configured", "hostname": "h", "region": "us"}
    assert session.register_payload(identity) == {
        "name": "prod",
        "region": "eu",
        "agent_version": "1.2",
        "hostname": "h",
        "agent_id": "pod-2",
        "cluster_id": "c-1",
        "k8s_service_token": "sa",
    }


def test_no_name_no_registration_and_nothing_is_made_up() -> None:
    session = agent("a-1")
    assert session.register_payload({"region": "eu"}) is None
    session.known = {"name": "prod"}
    assert session.register_payload({}) == {"agent_id": "a-1", "name": "prod"}


# --- which session ----------------------------------------------------------------------------------------------------


def table(*sessions: Session) -> Sessions:
    known = Sessions()
    for session in sessions:
        known.add(session)
    return known


def test_an_alias_names_the_session_else_the_agent_id_does() -> None:
    known = table(cluster("c-1"), agent("a-1"))
    known.set_alias(OWNER, "pod-1", SessionKey(OWNER, "cluster", "c-1"))
    assert known.key_of(OWNER, SessionTarget(TargetKind.ALIAS, "pod-1")) == SessionKey(OWNER, "cluster", "c-1")
    assert known.key_of(OWNER, SessionTarget(TargetKind.ALIAS, "a-1")) == SessionKey(OWNER, "agent", "a-1")
    assert known.key_of(OWNER, SessionTarget(TargetKind.CLUSTER, "pod-1")) == SessionKey(OWNER, "cluster", "pod-1")
    assert known.key_of(OTHER, SessionTarget(TargetKind.ALIAS, "pod-1")) == SessionKey(OTHER, "agent", "pod-1")


def test_an_alias_of_a_session_that_is_gone_names_nothing() -> None:
    session = cluster("c-1")
    known = table(session)
    known.set_alias(OWNER, "pod-1", session.key)
    known.remove(session)
    assert known.alias(OWNER, "pod-1") is None
    assert len(known) == 0
    assert not list(known.of_owner(OWNER))


def test_setting_an_alias_tells_whom_it_stood_for() -> None:
    first, second = cluster("c-1"), cluster("c-2")
    known = table(first, second)
    assert known.set_alias(OWNER, "pod-1", first.key) is None
    assert known.set_alias(OWNER, "pod-1", first.key) is None
    assert known.set_alias(OWNER, "pod-1", second.key) == first.key
    assert known.alias_is(OWNER, "pod-1", second.key)
    known.move_aliases(second.key, first.key)
    assert known.alias(OWNER, "pod-1") is first


@pytest.mark.parametrize(
    "cluster_id, agent_id, found",
    [
        ("c-1", "", ["c-1"]),
        ("up-2", "", ["c-2"]),  # the controller's id for it
        ("c-2", "", ["c-2"]),  # the agent's own
        ("up-3", "", ["a-1"]),
        ("c-1", "pod-1", ["c-1"]),
        ("c-1", "pod-9", ["c-1"]),  # agent ids change
        ("", "pod-1", ["c-1"]),
        ("", "pod-2", ["c-2"]),
        ("", "a-1", ["a-1"]),
        ("", "a-new", ["a-new"]),
        ("", "pod-9", []),
        ("c-9", "", []),
        ("c-9", "pod-1", []),
    ],
)
def test_a_target_means_one_session(cluster_id: str, agent_id: str, found: list[str]) -> None:
    known = table(
        cluster("c-1", upstream_cluster_id="c-1", agent_id="pod-1"),
        cluster("c-2", upstream_cluster_id="up-2", agent_id="pod-2"),
        agent("a-1", upstream_cluster_id="up-3"),
        agent("a-new"),  # has no cluster id upstream yet
        cluster("c-1", OTHER, upstream_cluster_id="c-9", agent_id="pod-9"),
    )
    known.set_alias(OWNER, "pod-1", SessionKey(OWNER, "cluster", "c-1"))
    known.set_alias(OWNER, "pod-2", SessionKey(OWNER, "cluster", "c-2"))
    known.set_alias(OTHER, "pod-9", SessionKey(OTHER, "cluster", "c-1"))
    assert [session.key.ident for session in known.find(OWNER, cluster_id, agent_id)] == found


def test_of_several_the_most_recently_seen_is_meant_unless_the_agent_id_tells() -> None:
    old = cluster("c-1", upstream_cluster_id="c-1", agent_id="pod-1", contact_at=5.0)
    new = cluster("c-2", upstream_cluster_id="c-1", agent_id="pod-2", contact_at=9.0)
    stored = cluster("c-3", upstream_cluster_id="c-1", agent_id="pod-3", last_seen_unix=1e9)
    known = table(old, new, stored)
    assert known.find(OWNER, "c-1", "pod-9") == [new, old, stored]
    assert known.find(OWNER, "c-1", "pod-1") == [old]
    assert known.find(OWNER, "c-1", "pod-2") == [new]


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.sampled_from("abc"), st.booleans()), max_size=12))
def test_no_lookup_ever_crosses_owners(entries: list[tuple[str, str, bool]]) -> None:
    known = Sessions()
    for owner, ident, by_cluster in entries:
        session = cluster(ident, owner, upstream_cluster_id=ident) if by_cluster else agent(ident, owner)
        known.add(session)
        known.set_alias(owner, f"alias-{ident}", session.key)
    for owner in ("x", "y"):
        for ident in ("a", "b", "c"):
            keys = [known.key_of(owner, SessionTarget(kind, ident)) for kind in TargetKind]
            keys += [known.key_of(owner, SessionTarget(TargetKind.ALIAS, f"alias-{ident}"))]
            keys += [session.key for session in known.find(owner, ident, "")]
            keys += [session.key for session in known.find(owner, "", f"alias-{ident}")]
            assert {key.owner for key in keys} <= {owner}


def test_a_session_is_found_by_the_id_that_the_controller_uses_now() -> None:
    known = Sessions()
    session = cluster("c-1")
    known.set_upstream_id(session, "up-1")
    assert known.find(OWNER, "up-1", "") == [], "it is not taken in yet"
    known.add(session)
    assert known.find(OWNER, "up-1", "") == [session]
    known.set_upstream_id(session, "up-2")
    assert [known.find(OWNER, ident, "") for ident in ("up-1", "up-2", "c-1")] == [[], [session], [session]]
    successor = cluster("c-1", upstream_cluster_id="up-3")
    known.add(successor)
    assert [known.find(OWNER, ident, "") for ident in ("up-2", "up-3")] == [[], [successor]]
    known.set_upstream_id(session, "up-4")
    assert known.find(OWNER, "up-4", "") == [], "it was replaced"
    known.remove(successor)
    assert known.find(OWNER, "up-3", "") == []


# --- The newest heartbeat of each agent is kept, and all of them together have a bound ---


def heartbeat_of(size_bytes: int) -> HeartbeatCall:
    return HeartbeatCall("agents", SessionTarget(TargetKind.AGENT, "a"), "a", size_bytes=size_bytes)


def full() -> tuple[Sessions, list[Session]]:
    """Sessions that have taken large heartbeats until one was refused."""
    sessions, kept = Sessions(), []
    while sessions.has_room_for(None, heartbeat_of(MAX_KEPT_BYTES)):
        session = Session(SessionKey("default", "agent", f"a{len(kept)}"), "agents")
        sessions.add(session)
        sessions.keep(session, heartbeat_of(MAX_KEPT_BYTES))
        kept.append(session)
    return sessions, kept


def test_large_heartbeats_fill_the_room_and_usual_ones_always_fit() -> None:
    sessions, kept = full()
    assert len(kept) == MAX_ALL_KEPT_BYTES // (MAX_KEPT_BYTES - FREE_KEPT_BYTES)
    assert sessions.has_room_for(None, heartbeat_of(FREE_KEPT_BYTES))
    assert sessions.has_room_for(kept[0], heartbeat_of(MAX_KEPT_BYTES)), "in the place of its own last one"


def test_a_smaller_heartbeat_and_a_forgotten_session_give_their_room_back() -> None:
    sessions, kept = full()
    sessions.keep(kept[0], heartbeat_of(100))
    assert sessions.has_room_for(None, heartbeat_of(MAX_KEPT_BYTES))
    sessions, kept = full()
    sessions.remove(kept[0])
    sessions.remove(kept[0])
    assert sessions.has_room_for(None, heartbeat_of(MAX_KEPT_BYTES))
    assert not sessions.has_room_for(None, heartbeat_of(2 * MAX_KEPT_BYTES))


def test_sessions_are_found_by_the_controllers_id_and_by_name_until_either_changes() -> None:
    sessions = Sessions()
    mine, other = (Session(SessionKey(owner, "cluster", "c-1"), "clusters_agent") for owner in ("o", "p"))
    for each in (mine, other):
        sessions.add(each)
        sessions.set_registration(each, {"name": "prod"})
    assert sessions.with_upstream_id("c-1") == [mine, other]
    assert sessions.with_upstream_id("c-1", "p") == [other]
    assert sessions.registered_as("o", "prod") == [mine]
    sessions.set_upstream_id(mine, "c-2")
    sessions.set_registration(mine, {"name": "test"})
    assert (sessions.with_upstream_id("c-1"), sessions.with_upstream_id("c-2")) == ([other], [mine])
    assert (sessions.registered_as("o", "prod"), sessions.registered_as("o", "test")) == ([], [mine])
    sessions.remove(mine)
    assert (sessions.with_upstream_id("c-2"), sessions.registered_as("o", "test")) == ([], [])


def test_one_more_of_many_agents_with_one_name_costs_as_much_as_the_first() -> None:
    """All agents of a shim may have the same name, and register together."""
    sessions = Sessions()
    for number in range(9000):
        each = Session(SessionKey("o", "cluster", f"c-{number}"), "clusters_agent")
        each.registration = {"name": "prod"}
        sessions.add(each)
    tracemalloc.start()
    try:
        sessions.set_registration(each, {"name": "prod"})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 50_000, "a copy of all takes four times as much"
    assert len(sessions.registered_as("o", "prod")) == 9000


def test_an_alias_follows_its_latest_session_and_goes_with_it() -> None:
    sessions = Sessions()
    first, second = (Session(SessionKey("o", "cluster", ident), "clusters_agent") for ident in ("c-1", "c-2"))
    for each in (first, second):
        sessions.add(each)
    assert sessions.set_alias("o", "a-1", first.key) is None
    assert sessions.set_alias("o", "a-2", first.key) is None
    assert sessions.set_alias("o", "a-2", second.key) == first.key
    sessions.remove(first)
    assert (sessions.alias("o", "a-1"), sessions.alias("o", "a-2")) == (None, second)
    sessions.set_alias("o", "a-1", first.key)
    sessions.move_aliases(first.key, second.key)
    assert sessions.alias("o", "a-1") is second


def test_removed_sessions_give_back_the_bytes_of_their_tunnels_and_leave_no_owner_behind() -> None:
    sessions = Sessions()
    state = {"x": "y" * (MAX_KEPT_BYTES // 2)}
    size_bytes = len(str(state))
    for round_ in range(2 * MAX_ALL_KEPT_BYTES // size_bytes):
        session = cluster(f"c-{round_}", owner=f"owner-{round_}")
        sessions.add(session)
        assert sessions.keep_tunnel(session, state, size_bytes)
        sessions.remove(session)
    assert not sessions._by_owner
    assert sessions._tunnel_bytes == 0


def test_a_session_that_was_removed_already_gives_back_nothing_again() -> None:
    sessions = Sessions()
    one, other = cluster("c-1"), cluster("c-2")
    for session in (one, other):
        sessions.add(session)
        sessions.keep_tunnel(session, {"x": "y" * 5000}, 5000)
    before = sessions._tunnel_bytes
    sessions.remove(one)
    sessions.remove(one)
    assert sessions._tunnel_bytes == before / 2
    assert list(sessions._by_owner) == [OWNER]


# --- storage, and what the estimators learn ---------------------------------------------------------------------------


def test_a_session_is_stored_whole_and_without_its_secret() -> None:
    session = cluster("c-1", upstream_cluster_id="c-2", registration={"name": "prod"}, reply={"status": "ok"})
    session.superseded_by = SessionKey(OWNER, "cluster", "c-3")
    session.hold.agent_disconnected(9.0)
    session.tunnel_hold.agent_disconnected(7.0)
    beat(session, 50.0, secret="s3cret")
    assert session.holds_changed
    record = session.record()
    assert not session.holds_changed
    assert (record.key, record.dialect, record.agent_id, record.upstream_cluster_id) == (
        *(session.key, "clusters_agent", "pod-1", "c-2"),
    )
    assert (record.registration, record.reply, record.last_seen_unix) == ({"name": "prod"}, {"status": "ok"}, 50.0)
    assert record.superseded_by == str(session.superseded_by)
    assert "s3cret" not in repr(record)
    again = Session.from_record(record)
    assert again.record() == record
    assert again.superseded_by == session.superseded_by
    assert (again.hold.ceiling_s, again.tunnel_hold.ceiling_s) == (8.0, 6.0)
    assert (session.persisted_last_seen, again.persisted_last_seen, again.last_seen_unix) == (50.0, 50.0, 50.0)


def test_a_new_session_is_stored_with_what_its_key_says() -> None:
    record = cluster("c-1").record()
    assert (record.agent_id, record.upstream_cluster_id, record.last_seen_unix) == ("", "c-1", 0.0)
    assert (record.superseded_by, list(record.hold)) == ("", ["poll"])
    assert (agent("a").record().agent_id, agent("a").record().upstream_cluster_id) == ("a", "")
    assert Session.from_record(record).superseded_by is None


def test_both_estimators_learn_the_interval_from_the_first_gap_on() -> None:
    session = cluster("c-1")
    holds = (session.hold, session.tunnel_hold)
    for hold in holds:
        for _ in range(9):
            hold.reply_sent(0.0, 20.0)
    for now, limit_s in ((0.0, 20.0), (5.0, 4.0), (8.0, 3.0), (11.0, 2.0), (14.0, 2.0)):
        beat(session, now)
        assert [hold.limit_s(20.0) for hold in holds] == [limit_s, limit_s]
        measured_s = 3.0 if now > 10.0 else None
        assert [hold.stored()["interval_s"] for hold in holds] == [measured_s, measured_s]


def test_a_heartbeat_completes_what_earlier_ones_said() -> None:
    session = cluster("c-1")
    beat(session, 0.0, tunnel="", known={"name": "prod", "version": "1"}, secret="s")
    beat(session, 5.0, tunnel="", known={"version": "2"})
    assert session.heartbeat_payload()["tunnel_status"] == "disconnected"
    assert session.register_payload({}) == {
        "name": "prod",
        "version": "2",
        "agent_id": "pod-1",
        "cluster_id": "c-1",
        "k8s_service_token": "s",
    }


def test_an_agent_id_of_the_registration_is_sent_if_no_call_had_one() -> None:
    for registration, agent_id in (({"name": "prod", "agent_id": "pod-7"}, "pod-7"), ({"name": "prod"}, "")):
        payload = cluster("c-1", registration=registration).register_payload({})
        assert payload is not None
        assert payload["agent_id"] == agent_id


def test_a_heartbeat_is_not_due_before_its_interval_at_any_time() -> None:
    session = cluster("c-1", sent_at=1000.0)
    session.last_sent_status = session.reported_status
    assert not session.heartbeat_due(1009.9, 10.0)
    assert session.heartbeat_due(1010.0, 10.0)


# --- bounds and look-ups, exactly -------------------------------------------------------------------------------------


def test_the_room_for_heartbeats_is_filled_to_the_last_byte() -> None:
    sessions, first, second = Sessions(), agent("a"), agent("b")
    for session in (first, second):
        sessions.add(session)
    sessions.keep(first, heartbeat_of(FREE_KEPT_BYTES))
    sessions.keep(second, heartbeat_of(1))
    whole = heartbeat_of(FREE_KEPT_BYTES + MAX_ALL_KEPT_BYTES)
    assert sessions.has_room_for(None, whole)
    assert not sessions.has_room_for(None, heartbeat_of(whole.size_bytes + 1))
    sessions.keep(first, whole)
    assert sessions.has_room_for(first, whole)
    assert not sessions.has_room_for(first, heartbeat_of(whole.size_bytes + 1))
    assert sessions.has_room_for(second, heartbeat_of(FREE_KEPT_BYTES))
    assert not sessions.has_room_for(second, heartbeat_of(FREE_KEPT_BYTES + 1))


def test_the_room_for_tunnel_states_is_filled_to_the_last_byte() -> None:
    sessions, first, second = Sessions(), agent("a"), agent("b")
    for session in (first, second):
        sessions.add(session)
    whole = FREE_KEPT_BYTES + MAX_ALL_KEPT_BYTES
    assert sessions.keep_tunnel(second, {"n": 0}, FREE_KEPT_BYTES)
    assert not sessions.keep_tunnel(first, {"n": 1}, whole + 1)
    assert first.tunnel is None
    for number in (2, 3):
        assert sessions.keep_tunnel(first, {"n": number}, whole)
        assert first.tunnel == {"n": number}
    assert sessions.keep_tunnel(second, {"n": 4}, FREE_KEPT_BYTES)
    assert not sessions.keep_tunnel(second, {"n": 5}, FREE_KEPT_BYTES + 1)
    assert sessions.keep_tunnel(first, {"n": 6}, FREE_KEPT_BYTES + 1)
    assert sessions.keep_tunnel(second, {"n": 7}, whole - 1)
    assert not sessions.keep_tunnel(first, {"n": 8}, FREE_KEPT_BYTES + 2)


def test_an_owner_has_its_own_sessions() -> None:
    one = agent("a")
    sessions = table(one, agent("b", OTHER))
    assert list(sessions.of_owner(OWNER)) == [one]
    assert list(sessions.of_owner("unknown")) == []


def test_an_unknown_session_can_be_removed_and_a_removed_one_has_no_aliases() -> None:
    one = agent("a")
    sessions = table(one)
    sessions.set_alias(OWNER, "pod-1", one.key)
    sessions.remove(agent("b", OTHER))
    sessions.remove(one)
    assert sessions.set_alias(OWNER, "pod-1", agent("c").key) is None
    sessions.move_aliases(one.key, agent("c").key)
    assert sessions.alias_is(OWNER, "pod-1", agent("c").key)


def test_a_call_of_an_agent_names_an_agents_session() -> None:
    sessions = table(cluster("x"), agent("x"))
    for kind, found in ((TargetKind.AGENT, "agent"), (TargetKind.ALIAS, "agent"), (TargetKind.CLUSTER, "cluster")):
        assert sessions.key_of(OWNER, SessionTarget(kind, "x")).kind == found


def test_a_cluster_id_that_is_both_the_agents_and_the_controllers_means_that_session_alone() -> None:
    exact, other = cluster("c", agent_id="pod-1"), agent("a", upstream_cluster_id="c", contact_at=9.0)
    sessions = table(exact, other)
    assert sessions.find(OWNER, "c", "") == [exact]
    assert sessions.find(OWNER, "c", "pod-1") == [exact]
    assert sessions.find(OWNER, "c", "a") == [other]
    assert sessions.find(OWNER, "c", "unknown") == [other, exact]
    sessions.set_upstream_id(exact, "c-2")
    assert sessions.find(OWNER, "c", "") == [other, exact]


def test_without_an_agent_id_a_session_without_one_is_not_preferred() -> None:
    one, two = agent("a", upstream_cluster_id="c", agent_id=""), agent("b", upstream_cluster_id="c", contact_at=9.0)
    assert table(one, two).find(OWNER, "c", "") == [two, one]


# --- answers to registrations -----------------------------------------------------------------------------------------


def test_an_agent_gets_what_the_controller_replied_with_the_cluster_id_that_it_knows() -> None:
    reply = {
        "cluster_uuid": "u-1",
        "name": "prod",
        "status": "active",
        "tunnel_url": "t",
        "api_server": "s",
        "workspace_id": 7,
        "registered_at": "2026-11-24T21:28:03Z",
    }
    session = cluster("c-1", agent_id="pod-1", reply=reply, registration={"name": "other"})
    told = Registered("c-1", "u-1", "prod", "pod-1", "active", "t", "s", 7, "2026-11-24T21:28:03Z", cached=True)
    assert session.registered(cached=True) == told
    session.upstream_cluster_id = "c-2"  # the uuid belongs to an id that the agent does not know
    assert session.registered(cached=False) == msgspec.structs.replace(told, cluster_uuid="c-1", cached=False)


def test_what_the_controller_did_not_reply_has_defaults() -> None:
    session = agent("a", upstream_cluster_id="c-1")
    assert session.registered(cached=False) == Registered("c-1", "c-1", "", "a", "registered")
    session.registration = {"name": "prod"}
    session.reply = {"name": "", "status": ""}
    assert session.registered(cached=False) == Registered("c-1", "c-1", "prod", "a", "registered")


def test_the_commands_of_a_superseded_session_are_with_its_last_successor_once_they_are_moved() -> None:
    first, second, third = agent("a"), agent("b"), agent("c")
    first.superseded_by, second.superseded_by = second.key, third.key
    assert first.home == first.key, "it has its commands until then"
    first.moved_to = second
    assert first.home == second.home == second.key
    second.moved_to = third
    assert first.home == second.home == third.home == third.key


def test_a_call_finds_the_session_that_it_names() -> None:
    one, two = cluster("x"), agent("x")
    sessions = table(one, two)
    for kind, found in ((TargetKind.CLUSTER, one), (TargetKind.AGENT, two), (TargetKind.ALIAS, two)):
        assert sessions.find_target(OWNER, SessionTarget(kind, "x")) is found
        assert sessions.find_target(OTHER, SessionTarget(kind, "x")) is None
        assert sessions.find_target(OWNER, SessionTarget(kind, "y")) is None
    assert list(sessions) == [one, two]
