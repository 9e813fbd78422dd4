"""Exceptions by origin of the fault, which only the outer layers convert to HTTP statuses or the exit codes below."""

from __future__ import annotations

from typing import NamedTuple

# Exit codes of commands: docs/reference/commands.md.
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_USAGE = 64
EXIT_INTERNAL = 70
EXIT_STORE_VERSION = 78


class ShimError(Exception):
    """Base of all exceptions of this package. Its text never contains a secret or a part of the input."""


class AgentError(ShimError):
    """A request of an agent that cannot be served (docs/reference/protocol.md#1-legacy-side).

    `status` is the HTTP status of the reply, and the text its `error` field. `allow` lists the methods of the route if
    the status is 405 (the `Allow` header of RFC 9110).
    """

    def __init__(
        self, status: int, message: str, *, retry_after_s: int | None = None, allow: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.allow = allow


class OperatorError(ShimError):
    """A request of an operator, mostly to the admin port, that cannot be served.

    `status` is that of the reply, `allow` as in `AgentError`.
    """

    def __init__(self, status: int, message: str, *, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.allow = allow


class MessageError(ShimError):
    """A frame from the controller that is no valid message. `kind` is a short label for metrics.

    The format is docs/reference/protocol.md#2-upstream-side-the-websocket.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class StoreError(ShimError):
    """A failed read or write of the store. No part of the submission was applied."""


class StoreUnreachable(StoreError):
    """A database that does not answer now. The same attempt may succeed later, without a change by an operator."""


class StoreFenced(StoreError):
    """A write of a replica that has lost the shard to another replica. The write was not stored."""


class StoreVersionError(StoreError):
    """A database written by a newer shim, which must not be changed (exit code 78)."""


class StartError(ShimError):
    """A configuration with which this machine cannot serve. The text names key, value and remedy."""


class IllegalTransition(ShimError):
    """An event that a state machine's table forbids in its state. Nothing was changed."""


class Fault(NamedTuple):
    """One fault of the configuration: the dotted key and a message, without the value if that may be secret."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(ShimError):
    """A configuration with faults, all of which are listed (exit code 2)."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = faults


class NoRoom(Exception):
    """An error of a body that is dropped because all connections together hold too many bytes."""


def describe(error: BaseException) -> str:
    """Return an exception's text for the log.

    The type's name is added unless the text is the shim's own or the system's.
    """
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe(inner) for inner in error.exceptions)
    if isinstance(error, (StoreError, ConfigError, StartError, OSError)):
        return str(error) or type(error).__name__  # `TimeoutError` has no text
    return f"{type(error).__name__}: {error}"
