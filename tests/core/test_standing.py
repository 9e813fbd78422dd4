"""Reasons why the controller does not regard an agent as connected."""

from __future__ import annotations

from shim.core.standing import UNACKNOWLEDGED, SessionStanding, Trouble, TroubleKind

UNKNOWN, NAME_UNKNOWN, REFUSED = TroubleKind.UNKNOWN, TroubleKind.NAME_UNKNOWN, TroubleKind.HEARTBEATS_REFUSED


def test_a_trouble_begins_once_and_keeps_the_last_text() -> None:
    standing = SessionStanding()
    assert standing.trouble is None
    assert standing.fail(UNKNOWN, "no such cluster", 5.0) is True
    assert standing.fail(UNKNOWN, "", 9.0) is False
    assert standing.trouble == Trouble(UNKNOWN, "no such cluster", 5.0)
    assert standing.fail(REFUSED, "overloaded", 12.0) is True
    assert standing.trouble == Trouble(REFUSED, "overloaded", 5.0)
    standing.acknowledged()
    assert standing.trouble is None
    assert standing.fail(REFUSED, "", 20.0) is True
    assert standing.trouble == Trouble(REFUSED, "", 20.0)


def test_that_the_name_is_unknown_is_the_more_precise_reason() -> None:
    standing = SessionStanding()
    standing.fail(NAME_UNKNOWN, "", 5.0)
    assert standing.fail(UNKNOWN, "", 6.0) is False
    assert standing.trouble == Trouble(NAME_UNKNOWN, "", 5.0)
    assert standing.fail(REFUSED, "", 7.0) is True


def test_a_registration_ends_a_trouble_only_if_the_next_heartbeat_is_not_refused() -> None:
    standing = SessionStanding()
    standing.fail(UNKNOWN, "", 5.0)
    standing.sent(6.0, 1)
    standing.registered()
    assert standing.trouble is None
    standing.sent(7.0, 1)
    standing.registered()
    assert standing.fail(UNKNOWN, "", 8.0) is False
    assert standing.trouble == Trouble(UNKNOWN, "", 5.0)
    standing.registered()
    for now in (9.0, 10.0):  # the first of these was not refused before the second was sent
        standing.sent(now, 1)
    assert standing.fail(UNKNOWN, "", 11.0) is True
    assert standing.trouble == Trouble(UNKNOWN, "", 11.0)


def test_three_heartbeats_without_an_acknowledgement_are_no_coincidence() -> None:
    standing = SessionStanding()
    assert standing.sent_on == 0
    for number in range(UNACKNOWLEDGED):
        assert standing.unacknowledged_since(200.0, 30.0) is None
        standing.sent(100.0 + number, 7)
    assert standing.sent_on == 7
    assert standing.unacknowledged_since(129.9, 30.0) is None
    assert standing.unacknowledged_since(130.0, 30.0) == 100.0
    standing.sent(140.0, 8)
    assert standing.unacknowledged_since(200.0, 30.0) is None, "another connection begins anew"
    for now in (141.0, 142.0):
        standing.sent(now, 8)
    assert standing.unacknowledged_since(200.0, 30.0) == 140.0
    standing.acknowledged()
    assert standing.unacknowledged_since(200.0, 30.0) is None
    for now in (300.0, 301.0, 302.0):
        standing.sent(now, 8)
    assert standing.unacknowledged_since(400.0, 30.0) == 300.0
