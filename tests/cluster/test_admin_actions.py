"""Admin actions at other replicas: which answers count, and what an operator is told if none does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("psycopg")

from shim.cluster.admin_actions import ReplicaClient
from shim.core.leases import Member
from shim.errors import OperatorError

UNKNOWN, AWAY, LATE = OperatorError(404, "unknown"), OperatorError(503, "b does not answer"), OperatorError(409, "late")


class Answering(ReplicaClient):
    """Other replicas by name, and what each of them answers or raises."""

    def __init__(self, **answers: Any) -> None:
        class Membership:
            def others(self) -> list[Member]:
                return [Member(name, name, "127.0.0.1:1", "f") for name in answers]

        membership: Any = Membership()
        pool: Any = None
        super().__init__(membership, pool)
        self._answers = answers

    async def ask(self, member: Member, action: str, target: str, body: bytes) -> dict[str, Any]:
        answer = self._answers[member.name]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


async def test_one_answer_is_enough_whatever_the_others_say() -> None:
    client = Answering(a=UNKNOWN, b=AWAY, c={"x": 1}, d=LATE)
    assert await client.ask_others("purge", "c-1", b"", required=True) == [("c", {"x": 1})]


@pytest.mark.parametrize("reason", [AWAY, LATE])
async def test_a_reason_is_told_if_an_answer_is_needed_and_none_came(reason: OperatorError) -> None:
    with pytest.raises(OperatorError) as refused:
        await Answering(a=UNKNOWN, b=reason).ask_others("purge", "c-1", b"", required=True)
    assert refused.value is reason
    assert await Answering(a=UNKNOWN, b=reason).ask_others("trace", "c-1", b"", required=False) == []


async def test_nobody_knows_it() -> None:
    assert await Answering(a=UNKNOWN, b=UNKNOWN).ask_others("purge", "c-1", b"", required=True) == []
    assert await Answering().ask_others("purge", "c-1", b"", required=True) == []
