"""The development controller as an object, for tests in the same process and for the command."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from devtools.controller.active_faults import ActiveFaults
from devtools.controller.commands import Command, CommandLog, CommandSpec
from devtools.controller.connections import Connections, DropSpec, RawSpec, written
from devtools.controller.control import Control
from devtools.controller.faults import AnyFault, How
from devtools.controller.handshake import CONTROLLER_PATH, GATEWAY_PATH, Handshakes
from devtools.controller.history import Event, EventKind, History, HistoryFile, Wanted
from devtools.controller.legacy import LegacyApi
from devtools.controller.registry import Registry
from devtools.controller.state import ControllerState, Options, Tokens
from shim.clock import Clock

_MAX_BODY_BYTES = 134_217_728


class DevController:
    """A controller: `async with DevController(["token"]) as controller:` serves until the block ends.

    `url` is the value for a shim's `upstream.url`; `control_url` is the base of the control API. `state` holds history,
    registrations, commands and faults; `connections` holds the open connections.
    """

    def __init__(
        self, tokens: Sequence[str], *, port: int = 0, options: Options | None = None, clock: Clock | None = None
    ) -> None:
        self._tokens = Tokens(tokens, (options or Options()).token_prefixes)
        self._port = port
        self._options = options or Options()
        self._clock = clock or Clock()
        self._runners: list[web.AppRunner] = []
        self._journal: HistoryFile | None = None
        self.listen = ("", 0)
        self.control = ("", 0)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the files and listen. Raises `OSError` if a file or the port cannot be opened."""
        options = self._options
        self._journal = HistoryFile(options.journal) if options.journal else None
        history = History(
            self._clock,
            max_events=options.history_events,
            max_bytes=options.history_bytes,
            journal=self._journal,
        )
        registry = Registry(self._clock, options.state)
        self.state = ControllerState(self._clock, options, history, ActiveFaults(), registry, CommandLog())
        self.connections = Connections(self.state)
        routes = Handshakes(self.connections, self._tokens).routes()
        legacy = LegacyApi(self.state, self._tokens)
        control = Control(self.connections, legacy).routes()
        routes = routes if options.control else routes + control
        routes += legacy.routes()
        self.listen = await self._serve(routes, options.host, self._port)
        self.control = await self._serve(control, *options.control) if options.control else self.listen
        scheme = "wss" if options.tls else "ws"
        self.connections.message_handler.gateway_url = f"{scheme}://{address(self.listen)}{GATEWAY_PATH}"
        history.record(EventKind.STARTED, listen=address(self.listen))

    async def _serve(self, routes: Sequence[web.AbstractRouteDef], host: str, port: int) -> tuple[str, int]:
        app = web.Application(middlewares=[_json_errors], client_max_size=_MAX_BODY_BYTES)
        app.add_routes(routes)
        # The access log would show tokens. A message whose sender has disconnected must still be handled.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=False, shutdown_timeout=0.1)
        self._runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, host, port, ssl_context=self._options.tls)
        await site.start()
        bound: tuple[str, int] = runner.addresses[0][:2]
        return bound

    async def stop(self, how: How = How.CLOSE) -> None:
        """End all connections and stop listening. `How.RST` looks like a killed process. Idempotent."""
        if not self._runners:
            return
        try:
            for runner in self._runners:
                for site in list(runner.sites):
                    await site.stop()  # first, because agents that are dropped reconnect at once
            await self.connections.drop_all(how)
            self.state.faults.clear_all()
            self.state.history.record(EventKind.STOPPED)
        finally:
            while self._runners:
                await self._runners.pop().cleanup()
            self.state.registry.close()
            if self._journal:
                self._journal.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- addresses ----------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Return the port of the listener."""
        return self.listen[1]

    @property
    def url(self) -> str:
        """Return the base URL for a configuration."""
        return f"{'https' if self._options.tls else 'http'}://{address(self.listen)}{self._options.base_path}"

    @property
    def ws_url(self) -> str:
        """Return the URL of the WebSocket endpoint, without a token."""
        return f"ws{self.url.removeprefix('http')}{CONTROLLER_PATH}"

    @property
    def control_url(self) -> str:
        """Return the base URL of the control API, without `/control`."""
        return f"{'https' if self._options.tls else 'http'}://{address(self.control)}"

    # --- methods for tests --------------------------------------------------------------------------------------------

    @property
    def history(self) -> History:
        """Return the history of all events."""
        return self.state.history

    async def push_command(self, **spec: Any) -> list[Command]:
        """Push commands; the fields are those of `CommandSpec`. Raises `OperatorError`, `msgspec.ValidationError`.

        Returns when they are sent, or after a second if faults hold them back.
        """
        pushed = self.connections.push(msgspec.convert(spec, CommandSpec))
        await written([item for _, item in pushed])
        return [command for command, _ in pushed]

    async def result_of(self, command_id: str, *, timeout_s: float = 5) -> dict[str, Any]:
        """Return the payload of the first result of a command. Raises `TimeoutError`."""

        def there() -> bool:
            command = self.state.commands.get(command_id)
            return command is not None and bool(command.results)

        command = self.state.commands.get(command_id) if await self.history.until(there, timeout_s) else None
        if command is None:
            raise TimeoutError(f"no result within {timeout_s} s")
        return command.results[0].payload

    async def send(self, **spec: Any) -> Event | None:
        """Send a message or a raw frame; the fields are those of `RawSpec`. Return the event of its sending."""
        (event,) = await written([self.connections.send(msgspec.convert(spec, RawSpec))])
        return event

    async def wait_for(self, wanted: Wanted, *, after: int = 0, timeout_s: float = 5) -> Event:
        """Return the first matching event above `after`. Raises `TimeoutError`."""
        return await self.history.wait_for(wanted, after=after, timeout_s=timeout_s)

    async def received(self, message_type: str, *, after: int = 0, timeout_s: float = 5) -> Event:
        """Return the first message of this type that was handled. Raises `TimeoutError`."""
        return await self.wait_for(
            lambda event: event.kind is EventKind.RECEIVED and event.type == message_type,
            after=after,
            timeout_s=timeout_s,
        )

    def set_fault(self, fault: AnyFault) -> int:
        """Set a fault and return its id."""
        return self.state.faults.add(fault)

    def clear_faults(self) -> None:
        """End all faults."""
        self.state.faults.clear_all()

    def drop(self, how: How = How.CLOSE, code: int = 1001, **target: Any) -> list[int]:
        """End all connections, or that of the target (fields of `Target`), and return their numbers."""
        return self.connections.drop(DropSpec(how=how, code=code, **target))


def address(bound: tuple[str, int]) -> str:
    """Format `host:port`, with brackets around an IPv6 address."""
    host, port = bound
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@web.middleware
async def _json_errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Give the server's own refusals (no such path, wrong method, body too large) the shape of all others."""
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as refused:
        headers = {"Allow": refused.headers["Allow"]} if "Allow" in refused.headers else {}
        body = {"success": False, "error": refused.reason}
        return web.json_response(body, status=refused.status, headers=headers)
    return response
