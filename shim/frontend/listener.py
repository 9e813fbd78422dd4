"""aiohttp's server with connections of our own kind."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from shim.frontend.connection import Connection, Express
from shim.frontend.house import House

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class ConnectionServer(web.Server):
    """aiohttp's server with connections of our own kind. `express` answers at once what it can."""

    def __init__(self, handler: Handler, house: House, express: Express, **options: Any) -> None:
        # aiohttp's default keeps a handler running after its agent has left: a held poll would swallow a command
        super().__init__(handler, handler_cancellation=True, **options)
        self._express = express
        self._house = house
        self._numbers = itertools.count(1)

    def __call__(self) -> Connection:
        return Connection(self, self._house, self._express, next(self._numbers), self._kwargs)
