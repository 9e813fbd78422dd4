"""OpenTelemetry traces of commands: one trace a command, from its arrival to its result, exported by OTLP over HTTP.

Needs the extra `agent-shim[otel]`. docs/how-to/traces.md describes the spans. Only a shim with `telemetry.otlp_url`
imports this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, StatusCode, set_span_in_context

from shim import __version__
from shim.core.records import ARRIVED, CommandState, SessionKey, TraceEntry
from shim.redaction import Redaction

MAX_OPEN = 10_000
"""Commands without an end whose spans are kept. Beyond it the oldest are given up."""

CLOSE_S = 1.0

_QUEUED, _AT_AGENT, _RETURNING = "wait for the agent", "at the agent", "return the result"
_PHASES = {"arrived": _QUEUED, "redeliver": _QUEUED, "uncertain": _QUEUED, "offered": _AT_AGENT, "result": _RETURNING}
"""The phase of a command that each step begins."""
_ENDS = {
    CommandState.CLOSED.value: StatusCode.OK,
    CommandState.EXPIRED.value: StatusCode.ERROR,
    CommandState.DEAD.value: StatusCode.ERROR,
}


@dataclass(slots=True)
class _Open:
    """Spans of a command that has not ended: the whole, and its present phase."""

    root: Span
    phase: Span | None = None


class Telemetry:
    """Exporter of the spans of all commands. It queues a bounded number of them, and sends in a thread of its own.

    The variables `OTEL_…` of the OpenTelemetry SDK count as well: headers, resource attributes, sampling.
    """

    def __init__(self, otlp_url: str, redaction: Redaction) -> None:
        resource = Resource.create({"service.name": "agent-shim", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(_as_event)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_url)))
        self._tracer = self._provider.get_tracer("agent-shim", __version__)
        self._redaction = redaction
        self._open: OrderedDict[tuple[SessionKey, str], _Open] = OrderedDict()

    def note(self, session: SessionKey, ids: Iterable[str], entry: TraceEntry) -> None:
        """Begin and end the spans that a step of some commands of a session changes."""
        for command_id in ids:
            self._note((session, command_id), entry)

    async def close(self) -> None:
        """Send what is queued, for at most `CLOSE_S`, although the collector may be away or hang."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            """Send what is queued, in a thread of its own."""
            self._provider.shutdown()
            loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="telemetry", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await done.wait()

    def _note(self, key: tuple[SessionKey, str], entry: TraceEntry) -> None:
        at_ns = int(entry.wall * 1e9)
        known = self._open.get(key)
        if known is None:
            if entry.event not in _PHASES:
                return  # a failure that is reported after the end
            known = self._open[key] = _Open(self._start(key, entry, at_ns))
            self._make_room()
        known.root.add_event(entry.event, {"detail": self._redaction.text(entry.detail, 256)}, at_ns)
        if entry.event in _PHASES or entry.event in _ENDS:
            if known.phase is not None:
                known.phase.end(at_ns)
            known.phase = None
        if entry.event in _ENDS:
            status = _ENDS[entry.event]
            known.root.set_status(status, entry.event if status is StatusCode.ERROR else None)
            known.root.set_attribute("agent_shim.command.end", entry.event)
            known.root.end(at_ns)
            del self._open[key]
        elif entry.event in _PHASES:
            parent = set_span_in_context(known.root, Context())
            known.phase = self._tracer.start_span(_PHASES[entry.event], parent, start_time=at_ns)

    def _start(self, key: tuple[SessionKey, str], entry: TraceEntry, at_ns: int) -> Span:
        session, command_id = key
        attributes: dict[str, str | bool] = {
            "agent_shim.command.id": self._redaction.text(command_id, 256),
            "agent_shim.agent.kind": session.kind,
            "agent_shim.agent.id": self._redaction.text(session.ident, 256),
            # Of a command that arrived before the start of the process only the rest is seen.
            "agent_shim.command.complete": entry.event == ARRIVED,
        }
        if entry.event == ARRIVED:
            attributes["agent_shim.command.type"] = self._redaction.text(entry.detail, 128)
        return self._tracer.start_span("command", Context(), attributes=attributes, start_time=at_ns)

    def _make_room(self) -> None:
        while len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)


def _as_event(record: logging.LogRecord) -> bool:
    """Make a line of the exporter an event of the shim, which is not repeated within a minute: each retry logs one."""
    vars(record).update(fields={"reason": record.getMessage()}, dedupe_key="", msg="traces_not_exported", args=())
    return True
