"""The newest heartbeat of each agent is kept, and all of them together have a bound."""

from __future__ import annotations

from shim.core.agent_calls import HeartbeatCall, SessionTarget, TargetKind
from shim.core.bounds import FREE_KEPT_BYTES, MAX_ALL_KEPT_BYTES, MAX_KEPT_BYTES
from shim.core.records import SessionKey
from shim.core.sessions import Session, Sessions


def beat(size_bytes: int) -> HeartbeatCall:
    return HeartbeatCall("agents", SessionTarget(TargetKind.AGENT, "a"), "a", size_bytes=size_bytes)


def full() -> tuple[Sessions, list[Session]]:
    """Sessions that have taken large heartbeats until one was refused."""
    sessions, kept = Sessions(), []
    while sessions.has_room_for(None, beat(MAX_KEPT_BYTES)):
        session = Session(SessionKey("default", "agent", f"a{len(kept)}"), "agents")
        sessions.add(session)
        sessions.keep(session, beat(MAX_KEPT_BYTES))
        kept.append(session)
    return sessions, kept


def test_large_heartbeats_fill_the_room_and_usual_ones_always_fit() -> None:
    sessions, kept = full()
    assert len(kept) == MAX_ALL_KEPT_BYTES // (MAX_KEPT_BYTES - FREE_KEPT_BYTES)
    assert sessions.has_room_for(None, beat(FREE_KEPT_BYTES))
    assert sessions.has_room_for(kept[0], beat(MAX_KEPT_BYTES)), "in the place of its own last one"


def test_a_smaller_heartbeat_and_a_forgotten_session_give_their_room_back() -> None:
    sessions, kept = full()
    sessions.keep(kept[0], beat(100))
    assert sessions.has_room_for(None, beat(MAX_KEPT_BYTES))
    sessions, kept = full()
    sessions.remove(kept[0])
    sessions.remove(kept[0])
    assert sessions.has_room_for(None, beat(MAX_KEPT_BYTES))
    assert not sessions.has_room_for(None, beat(2 * MAX_KEPT_BYTES))
