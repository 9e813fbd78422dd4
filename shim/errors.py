"""Errors by whose fault they are; only the edges turn them into HTTP statuses or exit codes."""

from __future__ import annotations

from typing import NamedTuple


class ShimError(Exception):
    """Base of every error this package raises on purpose. Its text never contains a secret or echoed input."""


class AgentError(ShimError):
    """The local agent sent something that cannot be served (docs/reference/protocol.md#1-legacy-side).

    `status` is the HTTP status that says so; the text becomes the `error` field of the reply. `allow` lists the methods
    of the route where the status is 405 (the `Allow` header of RFC 9110).
    """

    def __init__(
        self, status: int, message: str, *, retry_after_s: int | None = None, allow: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.allow = allow


class OperatorError(ShimError):
    """What a person asked of the admin port cannot be done; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class MessageError(ShimError):
    """The controller sent a frame that is no message. `kind` is a short bounded label for metrics.

    Rules: docs/reference/protocol.md#2-upstream-side-the-websocket.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class StoreError(ShimError):
    """The store could not carry out a write or a read; nothing of the submission was applied."""


class StoreFenced(StoreError):
    """Another replica has taken the shard; nothing of this one's is stored any more."""


class StoreVersionError(StoreError):
    """The database was written by a newer shim and must not be touched (exit 78)."""


class StartError(ShimError):
    """The process cannot serve with this configuration on this machine; the text names key, value and what to do."""


class IllegalTransition(ShimError):
    """A state machine was given an event that its table forbids in its state. Nothing was changed."""


class Fault(NamedTuple):
    """One fault of the configuration: dotted key path and what is wrong, without the value where it may be secret."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(ShimError):
    """The configuration has faults; all of them are listed (exit 2)."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = faults


def describe(error: BaseException) -> str:
    """Return an error for the log: its own text if that is ours or the system's."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe(inner) for inner in error.exceptions)
    if isinstance(error, (StoreError, ConfigError, StartError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
