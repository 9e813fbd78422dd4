"""The table of a command's life is total: what it does not say raises (docs/reference/protocol.md#3-commands)."""

from __future__ import annotations

import pytest

from shim.core.command_queue import TRANSITIONS, CommandEvent, next_state
from shim.core.records import CommandState
from shim.errors import IllegalTransition

S, E = CommandState, CommandEvent
EXPECTED = {
    E.OFFER: {S.QUEUED: S.OFFERED, S.UNCERTAIN: S.OFFERED},
    E.UNWRITTEN: {S.OFFERED: S.QUEUED},
    E.EVIDENCE: {S.OFFERED: S.DELIVERED, S.UNCERTAIN: S.DELIVERED},
    E.NO_EVIDENCE: {S.OFFERED: S.UNCERTAIN},
    E.RESULT: dict.fromkeys(S, S.ANSWERED) | {S.CLOSED: S.CLOSED},
    E.FENCED: {S.ANSWERED: S.CLOSED},
    E.EXPIRE: {S.QUEUED: S.EXPIRED},
    E.GIVE_UP: {S.QUEUED: S.DEAD, S.UNCERTAIN: S.DEAD},
    E.FORGET: dict.fromkeys((S.QUEUED, S.OFFERED, S.UNCERTAIN), S.EXPIRED),
    E.REDELIVER: dict.fromkeys((S.DELIVERED, S.EXPIRED, S.DEAD), S.QUEUED),
}


@pytest.mark.parametrize("step", E, ids=lambda step: step.name)
@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
def test_every_cell(state: CommandState, step: CommandEvent) -> None:
    if state in EXPECTED[step]:
        assert next_state(state, step) is EXPECTED[step][state]
    else:
        with pytest.raises(IllegalTransition, match=f"{step.name} in {state.name}"):
            next_state(state, step)


def test_a_result_is_taken_in_every_state() -> None:
    assert {state for state, step in TRANSITIONS if step is E.RESULT} == set(S)
