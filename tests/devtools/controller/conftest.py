"""A controller for one test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from devtools.controller.server import DevController
from tests.support.wsagent import TOKEN


@pytest.fixture
async def controller() -> AsyncIterator[DevController]:
    async with DevController([TOKEN, "tok-2"]) as serving:
        yield serving
