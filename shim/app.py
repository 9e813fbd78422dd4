"""Composition root: construction, start, signals, reload and stop of one shim."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from shim import __version__
from shim.admin import AdminServer
from shim.agent_api import AgentServer, Backends
from shim.bridge import Bridge
from shim.clock import Clock
from shim.config import loader
from shim.config.files import FileWatcher
from shim.config.reloader import ConfigReloader
from shim.config.settings import Settings
from shim.errors import (
    EXIT_CONFIG,
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_STORE_VERSION,
    ConfigError,
    StartError,
    StoreError,
    StoreVersionError,
    describe,
)
from shim.fallback import sunset_headers
from shim.hosts import host_and_port
from shim.log import Logs, get
from shim.management.command_api import CommandApi
from shim.management.recent_events import RecentEvents
from shim.management.status_builder import Health, StatusBuilder
from shim.metrics import Metrics, Registry
from shim.ports import AgentService, CommandStore, DeliveryEvidence, UpstreamPort
from shim.process import (
    GarbageSearch,
    LoopLagMeter,
    report_loop_error,
    security_warnings,
    trim_heap,
    write_ready_file,
)
from shim.protocol import dialects
from shim.protocol.http import origin_of
from shim.runtime import Runtime, RuntimeContext, SingleRuntime
from shim.store import CallThreadsafe, commit_probe, open_store
from shim.upstream import AiohttpUpstream

log = get(__name__)

STOP_S = 3.4
STEP_S = 0.25

Step = Callable[[], Coroutine[Any, Any, None]]


class App:
    """One running shim. Several may run in one process, because there is no global state."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        logging: Logs,
        config_path: str | None = None,
        ready_file: str | None = None,
        files: FileWatcher | None = None,
    ) -> None:
        """Create a shim. `load` reads the configuration again.

        `files` has recorded the configuration file before it was read, so that no change is missed.
        """
        self.settings = settings
        self.stop_requested = asyncio.Event()
        self.stop_began: Callable[[], None] = lambda: None
        self.bridge: Bridge | None = None
        self.addresses: dict[str, str] = {}
        self.ready = asyncio.Event()
        self._logging = logging
        self._ready_file = ready_file
        self._tasks: asyncio.TaskGroup | None = None
        self._undo: list[Step] = []
        self._metrics = Metrics(Registry())
        logging.count_drops(self._metrics.log_lines_dropped.inc)
        self._start_scope: asyncio.Timeout | None = None
        self._owned: set[asyncio.Task[None]] = set()
        self._store_fault: StoreError | None = None
        self._token = ""
        self._clock = self.make_clock()
        self._reloader = ConfigReloader(
            *(load, files or FileWatcher(), config_path, self._apply, self._keep_old, self.stop_requested),
            until_tick_s=self._clock.until_tick_s,
        )
        self._reloader.changed(settings.upstream.token_file)
        self._announced_token = self._present_token()
        self._runtime: Runtime | None = None

    async def run(self) -> int:
        """Start, serve until a stop is requested, and stop. Returns the exit code."""
        code = EXIT_OK
        try:
            async with asyncio.TaskGroup() as self._tasks:
                asyncio.get_running_loop().set_exception_handler(report_loop_error)
                self._handle_signals(asyncio.get_running_loop())
                try:
                    await self._start_unless_stopped()
                    await self.stop_requested.wait()
                    if self._store_fault is not None:
                        raise self._store_fault
                finally:
                    await self._stop()
        except* ConfigError as group:
            code = EXIT_CONFIG
            log.error("config_refused", error=describe(group))
        except* StoreVersionError as group:
            code = EXIT_STORE_VERSION
            log.error("store_version", error=describe(group))
        except* Exception as group:  # noqa: BLE001 - the one place where a fault ends the process
            code = EXIT_INTERNAL
            log.error("stopped_by_fault", error=describe(group))
        return code

    def spawn(self, name: str, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Run a coroutine as a task owned by this process. During the stop the coroutine is closed instead."""
        if self._tasks is None or self.stop_requested.is_set():
            coro.close()
            return None
        task = self._tasks.create_task(coro, name=name)
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)
        return task

    def spawn_isolated(self, name: str, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Run a coroutine that serves one connection or one call, like `spawn`.

        An exception of it is logged and counted, and the process goes on, unlike after the failure of a service. The
        coroutine must release what it serves itself, also when it fails.
        """

        async def isolated() -> None:
            """Await the coroutine, and catch what it raises."""
            try:
                await coro
            except Exception:
                self._metrics.internal_errors.labels("connection").inc()
                log.exception("task_failed", task=name)

        task = self.spawn(name, isolated())
        if task is None:
            coro.close()
        else:
            task.add_done_callback(lambda _: coro.close())  # a task that is cancelled at once never awaits it
        return task

    # --- the start list -----------------------------------------------------------------------------------------------

    async def _start_unless_stopped(self) -> None:
        """Start, or cancel the start when a stop is requested.

        Opening a store on a disk that hangs may never end.
        """
        try:
            async with asyncio.timeout(None) as self._start_scope:
                await self._start()
        except TimeoutError:
            if not self.stop_requested.is_set():
                raise
        finally:
            self._start_scope = None

    def _request_stop(self) -> None:
        self.stop_requested.set()
        if self._start_scope is not None:
            self._start_scope.reschedule(0)

    async def _start(self) -> None:
        """Start the parts in the order of one list, which `_stop` undoes in reverse."""
        settings, clock = self.settings, self._clock
        self._count_rollout()
        for secret in loader.secrets(settings):
            self._logging.redaction.add(secret)
        for event, hint in security_warnings(settings):
            log.warning(event, hint=hint)
        upstream = AiohttpUpstream(settings.upstream, self.spawn_isolated)
        runtime = build_runtime(self._make_context(clock, upstream), self.make_store)
        if isinstance(runtime, SingleRuntime):
            self.bridge = runtime.bridge
        redaction = self._logging.redaction
        admin = AdminServer(
            settings.admin,
            self._make_status(runtime),
            Health(runtime.subject),
            CommandApi(runtime.subject),
            self._metrics.registry,
            redaction,
        )
        agents = self._make_agent_server(runtime)
        steps: tuple[tuple[Step | None, Step | None], ...] = (
            (None, upstream.close),
            (None, runtime.close),
            (partial(self._bind, admin, agents), admin.stop),
            (partial(self._open, runtime, admin), None),
            (partial(self._start_runtime, runtime), runtime.stop),
            (None, runtime.fallback.close),
            (partial(self._serve_agents, agents, admin), agents.stop),
        )
        for start, undo in steps:
            if undo is not None:
                self._undo.append(undo)  # before the start, which may fail halfway
            if start is not None:
                await start()
        self.spawn("watch", self._reloader.watch(lambda: self.settings.upstream.token_file, self._token_changed))
        LoopLagMeter(asyncio.get_running_loop(), clock, self._metrics).start()
        GarbageSearch(asyncio.get_running_loop(), clock).start()
        if settings.notify.wanted:
            from shim.notify import Notifier  # noqa: PLC0415 - few ask for notifications

            notifier = Notifier(settings.notify, admin.status, clock, self.stop_requested, redaction)
            self.spawn("notify", notifier.run())
        trim_heap()
        self._announce()

    def _make_context(self, clock: Clock, upstream: UpstreamPort) -> RuntimeContext:
        loop = asyncio.get_running_loop()
        return RuntimeContext(
            settings=self.settings,
            clock=clock,
            timers=loop,
            rng=random.random,
            new_id=lambda: uuid.uuid4().hex,
            call_threadsafe=loop.call_soon_threadsafe,
            spawn=self.spawn,
            spawn_isolated=self.spawn_isolated,
            metrics=self._metrics,
            upstream=self.wrap_upstream(upstream),
            read_token=self._read_token,
            token_for_agents=self._token_for_agents,
            on_store_corrupt=self._store_broken,
            redaction=self._logging.redaction,
            **self._telemetry(),
        )

    def _make_status(self, runtime: Runtime) -> StatusBuilder:
        """Return the builder of the status that the admin port shows."""
        return StatusBuilder(runtime.subject, self.addresses, RecentEvents(self._clock, self._logging.redaction))

    async def _bind(self, admin: AdminServer, agents: AgentServer) -> None:
        """Bind both ports before the store is opened and a link is dialled.

        So a second shim with the same configuration fails before it changes anything.
        """
        await admin.bind()
        await agents.bind()

    async def _open(self, runtime: Runtime, admin: AdminServer) -> None:
        """Open the store, and serve the admin port, which the runtime may need while it waits for the store."""
        await runtime.open(partial(self._serve_admin, admin))
        self._runtime = runtime
        self.addresses |= runtime.addresses
        await self._serve_admin(admin)

    async def _start_runtime(self, runtime: Runtime) -> None:
        runtime.start()

    async def _serve_agents(self, agents: AgentServer, admin: AdminServer) -> None:
        host, port = await agents.start()
        self.addresses["listen"] = host_and_port(host, port)
        admin.agents_served = True

    async def _serve_admin(self, admin: AdminServer) -> None:
        """Listen on the admin port, unless it was done while the store was waited for."""
        if "admin" not in self.addresses:
            host, port = await admin.start()
            self.addresses["admin"] = host_and_port(host, port)

    def _telemetry(self) -> dict[str, Any]:
        """Return the part of the context that exports traces, nothing if none are wanted. Raises `StartError`."""
        url = self.settings.telemetry.otlp_url
        if not url:
            return {}
        try:
            from shim.telemetry import Telemetry  # noqa: PLC0415 - an extra, and 10 MB of memory
        except ModuleNotFoundError as error:
            raise StartError(f"telemetry.otlp_url needs agent-shim[otel]: {error.name} is not installed") from error
        telemetry = Telemetry(url, self._logging.redaction)
        self._undo.append(telemetry.close)
        return {"note_step": telemetry.note}

    def _make_agent_server(self, runtime: Runtime) -> AgentServer:
        settings = self.settings
        self._metrics.fallback_active.set_function(runtime.fallback.active)
        sunset = sunset_headers(settings.sunset)
        return AgentServer(
            settings.listen,
            Backends(
                self.wrap_agent_service(runtime.agent_service),
                self.wrap_evidence(runtime.evidence),
                runtime.fallback,
                runtime.forwarder,
                runtime.websockets,
                settings.upstream.max_message_bytes,
            ),
            dialects.load(),
            self._metrics,
            token=None if settings.upstream.own_tokens else self._token_for_agents,
            static_headers=lambda: sunset,
            refused_calls=runtime.subject.ctx.refused_calls,
        )

    # Tests override these methods to observe or delay the calls between two parts.

    def make_clock(self) -> Clock:
        """Return the clock."""
        return Clock()

    def make_store(self, call_threadsafe: CallThreadsafe) -> CommandStore:
        """Return the store. `call_threadsafe` is passed to `open_store`."""
        return open_store(self.settings.store, call_threadsafe, commit_probe(self._metrics, self._store_broken))

    def _store_broken(self, error: StoreError) -> None:
        """Stop the process after the store was found corrupt.

        Its successor moves the database aside. This process could only reject every write.
        """
        self._store_fault = error
        self._request_stop()

    def wrap_upstream(self, upstream: UpstreamPort) -> UpstreamPort:
        """Return the upstream that the bridge uses."""
        return upstream

    def wrap_agent_service(self, agent_service: AgentService) -> AgentService:
        """Return the service that the agents' server calls."""
        return agent_service

    def wrap_evidence(self, evidence: DeliveryEvidence) -> DeliveryEvidence:
        """Return the receiver of delivery evidence that the agents' server calls."""
        return evidence

    def _announce(self) -> None:
        if self._ready_file:
            write_ready_file(self._ready_file, {**self.addresses, "pid": os.getpid()})
        log.info(
            "serving",
            version=__version__,
            mode=self.settings.mode,
            upstream=origin_of(self.settings.upstream.url),
            **self.addresses,
        )
        self.ready.set()

    async def _stop(self) -> None:
        """Undo the start list in reverse.

        Held polls are answered first, so that agents need not wait for the other steps.

        All steps together take at most `STOP_S`. A step that hangs leaves `STEP_S` for each step after it.
        """
        self.stop_requested.set()
        self.stop_began()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + STOP_S
        if self._runtime is not None:
            self._runtime.quiesce()
        for later, undo in reversed(list(enumerate(self._undo))):
            try:
                async with asyncio.timeout_at(end_s - STEP_S * later):
                    await undo()
            except Exception as error:  # noqa: BLE001 - the rest of the list must be undone nevertheless
                log.error("stop_failed", step=getattr(undo, "__qualname__", "?"), error=describe(error))
        if self._owned:
            await asyncio.wait(self._owned, timeout=STEP_S)
        for task in self._owned:
            task.cancel()
        log.info("stopped")

    def _handle_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # outside of the main thread the owner calls us
                loop.add_signal_handler(number, self._request_stop)
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(signal.SIGHUP, self.reload)

    # --- reload of the configuration ----------------------------------------------------------------------------------

    def _read_token(self) -> str:
        token = self._token = loader.read_token(self.settings)
        self._logging.redaction.add(token)
        return token

    def _present_token(self) -> str:
        """Return the token that the links would use now, or an empty string if there is none."""
        try:
            return loader.read_token(self.settings)
        except ConfigError:
            return ""

    def _token_for_agents(self) -> str:
        """Return the Bearer token that agents must send if `listen.auth` requires one.

        The file is read once, and again after it has changed.
        """
        return self._token or self._read_token()

    def _token_changed(self) -> None:
        """Dial again if the file has another token: a link that works outlives a file without one.

        Each dial and each call with `fallback.use_upstream_token` reads the file, too, so `_token` may be new already.
        """
        if self._runtime is None:
            return
        try:
            token = self._read_token()
        except ConfigError as error:
            log.error("token_unreadable", error=str(error))
            return
        if token != self._announced_token:
            self._announced_token = token
            log.info("token_changed")
            self._runtime.token_changed()

    def reload(self) -> None:
        """Request a reload of the configuration: now, or after the start."""
        self._reloader.request()
        if self.ready.is_set():
            self.spawn("reload", self._reloader.reload())

    def _count_rollout(self) -> None:
        """Set the metrics of the rollout: a canary is watched for a day, counted from its last change."""
        self._metrics.rollout_percent.set(self.settings.rollout.percent)
        self._metrics.rollout_changed.set(self._clock.wall_s())

    def _keep_old(self, faults: list[str]) -> None:
        self._metrics.config_valid.set(0)
        log.error("config_faulty", faults=faults)

    def _apply(self, fresh: Settings) -> None:
        self._metrics.config_valid.set(1)
        old, self.settings = self.settings, loader.apply_reloadable(self.settings, fresh)
        for secret in loader.secrets(fresh):
            self._logging.redaction.add(secret)
        self._logging.set_level(self.settings.log.level)
        if (old.mode, old.rollout) != (self.settings.mode, self.settings.rollout):
            self._count_rollout()
        if self._runtime is not None:
            self._runtime.reload(self.settings)
            if old.upstream != self.settings.upstream:
                self._token = ""
                self._announced_token = self._present_token()
                self._runtime.token_changed()
        ignored = loader.needs_restart(self.settings, fresh)
        log.info("config_reloaded", mode=self.settings.mode, needs_restart=ignored)


def build_runtime(context: RuntimeContext, make_store: Callable[[CallThreadsafe], CommandStore]) -> Runtime:
    """Return the runtime: one bridge with its store, or a replica with its share of the shards.

    Raises `StoreError` if an optional dependency is missing.
    """
    if context.settings.store.url:
        try:
            from shim.cluster.replica import Replica  # noqa: PLC0415 - needs an extra, and memory only in clusters
        except ModuleNotFoundError as error:
            raise StoreError(f"store.url needs agent-shim[postgres]: {error.name} is not installed") from error
        return Replica(context)
    return SingleRuntime(context, make_store(context.call_threadsafe))
