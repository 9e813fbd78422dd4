"""The life of a command as a table (protocol.md §3)."""

from __future__ import annotations

from enum import Enum

from shim.core.records import CommandState
from shim.errors import IllegalTransition


class CommandEvent(Enum):
    """What can happen to a command."""

    OFFER = "offer"  # put into a poll reply
    UNWRITTEN = "unwritten"  # the reply did not reach the agent: no attempt
    EVIDENCE = "evidence"  # the agent has it
    NO_EVIDENCE = "no_evidence"  # nobody can tell
    RESULT = "result"  # the agent's result is on disk
    FENCED = "fenced"  # the controller has the result
    EXPIRE = "expire"
    GIVE_UP = "give_up"  # attempts used up, at most once, or purged by hand
    FORGET = "forget"  # its session is deleted
    REDELIVER = "redeliver"  # by hand


_S, _E = CommandState, CommandEvent
TRANSITIONS: dict[tuple[CommandState, CommandEvent], CommandState] = {
    (_S.QUEUED, _E.OFFER): _S.OFFERED,
    (_S.QUEUED, _E.EXPIRE): _S.EXPIRED,
    (_S.QUEUED, _E.GIVE_UP): _S.DEAD,
    (_S.QUEUED, _E.FORGET): _S.EXPIRED,
    (_S.OFFERED, _E.UNWRITTEN): _S.QUEUED,
    (_S.OFFERED, _E.EVIDENCE): _S.DELIVERED,
    (_S.OFFERED, _E.NO_EVIDENCE): _S.UNCERTAIN,
    (_S.OFFERED, _E.FORGET): _S.EXPIRED,
    (_S.UNCERTAIN, _E.OFFER): _S.OFFERED,
    (_S.UNCERTAIN, _E.EVIDENCE): _S.DELIVERED,
    (_S.UNCERTAIN, _E.GIVE_UP): _S.DEAD,
    (_S.UNCERTAIN, _E.FORGET): _S.EXPIRED,
    (_S.DELIVERED, _E.REDELIVER): _S.QUEUED,
    (_S.EXPIRED, _E.REDELIVER): _S.QUEUED,
    (_S.DEAD, _E.REDELIVER): _S.QUEUED,
    (_S.ANSWERED, _E.FENCED): _S.CLOSED,
    # A valid result is always stored, in every state; after an end it changes the state no more than a repeat does.
    (_S.QUEUED, _E.RESULT): _S.ANSWERED,
    (_S.OFFERED, _E.RESULT): _S.ANSWERED,
    (_S.UNCERTAIN, _E.RESULT): _S.ANSWERED,
    (_S.DELIVERED, _E.RESULT): _S.ANSWERED,
    (_S.EXPIRED, _E.RESULT): _S.ANSWERED,
    (_S.DEAD, _E.RESULT): _S.ANSWERED,
    (_S.ANSWERED, _E.RESULT): _S.ANSWERED,
    (_S.CLOSED, _E.RESULT): _S.CLOSED,
}


def next_state(state: CommandState, step: CommandEvent) -> CommandState:
    """The state after `step`; raises `IllegalTransition` for a cell that the table does not have."""
    after = TRANSITIONS.get((state, step))
    if after is None:
        raise IllegalTransition(f"{step.name} in {state.name}")
    return after
