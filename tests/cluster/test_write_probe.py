"""Readiness of a replica without a shard: a write succeeds while the database answers."""

from __future__ import annotations

from typing import Any

import pytest

from shim.cluster.replica import DatabaseProbe
from shim.core.records import WriteProbe
from shim.errors import StoreError


@pytest.mark.parametrize("answers", [True, False])
def test_a_write_succeeds_while_the_database_answers(answers: bool) -> None:
    posted: list[Any] = []
    probe = DatabaseProbe(lambda: answers, posted.append)
    outcomes: list[Any] = []
    assert probe.open().key == b""
    probe.submit(WriteProbe(1.0), done=outcomes.append)
    probe.submit(WriteProbe(1.0))
    assert outcomes == []  # the outcome comes in a later turn of the loop, as that of a real store
    (callback,) = posted
    callback()
    assert isinstance(outcomes[0], StoreError) is not answers
    probe.close()
