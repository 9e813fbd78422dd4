"""Faults that a controller can simulate, each as the JSON object that `POST /control/faults` takes.

Fields common to all: `after_s` (delay before the start), `duration_s` (time until the end), `count` (number of times,
if it can be counted), and the limits `endpoint`, `connection`, `agent_id`, all of which must match. Several faults may
be set at once.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, ClassVar

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
CloseCode = Annotated[int, msgspec.Meta(ge=1000, le=4999)]


class How(Enum):
    """Way in which a connection ends."""

    CLOSE = "close"  # with a close frame
    ABORT = "abort"  # without a close frame, by FIN (the kernel sends RST if there are unread bytes)
    RST = "rst"  # by RST


class Endpoint(Enum):
    """One of the two WebSocket endpoints."""

    CONTROLLER = "controller"
    GATEWAY = "gateway"


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Fields common to all faults. `counted` is true if `count` has a meaning."""

    counted: ClassVar[bool] = True

    count: Positive | None = None
    after_s: Seconds = 0
    duration_s: Seconds | None = None
    endpoint: Endpoint | None = None
    connection: Positive | None = None
    agent_id: str | None = None


# --- the handshake ----------------------------------------------------------------------------------------------------


class Refuse(Fault, frozen=True, tag="refuse"):
    """Answer the handshake with this status before the token is checked."""

    status: Annotated[int, msgspec.Meta(ge=300, le=599)] = 503
    retry_after_s: int | None = None
    headers: dict[str, str] = {}
    error: str = ""


class HangHandshake(Fault, frozen=True, tag="hang_handshake"):
    """Leave the handshake unanswered until the fault ends."""

    counted = False


class AcceptThenClose(Fault, frozen=True, tag="accept_then_close"):
    """Accept the handshake and end the connection at once."""

    how: How = How.CLOSE
    code: CloseCode = 1011


# --- connections ------------------------------------------------------------------------------------------------------


class Drop(Fault, frozen=True, tag="drop"):
    """End connections.

    Without `on`, all that are open when the fault starts are ended. With `on`, the connection on which a message of
    that type arrives is ended, after the message was handled or, with `discard`, instead.
    """

    how: How = How.CLOSE
    code: CloseCode = 1001
    reason: Annotated[str, msgspec.Meta(max_length=30)] = ""
    on: str = ""
    discard: bool = False


class Silent(Fault, frozen=True, tag="silent"):
    """Stop reading and writing with the socket open. `new_connections` includes connections that open later."""

    counted = False

    new_connections: bool = False


class Stalled(Fault, frozen=True, tag="stalled"):
    """Answer pings and nothing else, as an unresponsive application behind a working proxy does.

    Messages that arrive are discarded; messages to send wait. `new_connections` includes connections that open later.
    """

    counted = False

    new_connections: bool = False


class Slow(Fault, frozen=True, tag="slow"):
    """Delay each message, in both directions, by `latency_s` and by its size at `bytes_per_s`."""

    counted = False

    latency_s: Seconds = 0
    bytes_per_s: Positive | None = None

    def takes_s(self, size_bytes: int) -> float:
        """Return the duration for a message of this size."""
        return self.latency_s + (size_bytes / self.bytes_per_s if self.bytes_per_s else 0)


# --- messages to the agent --------------------------------------------------------------------------------------------


class Delay(Fault, frozen=True, tag="delay"):
    """Send messages of these types (empty: all) later; other messages overtake them."""

    delay_s: Seconds
    types: tuple[str, ...] = ()


class Duplicate(Fault, frozen=True, tag="duplicate"):
    """Send each message of these types `times` times."""

    times: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 2
    types: tuple[str, ...] = ("command",)


class Reorder(Fault, frozen=True, tag="reorder"):
    """Hold messages of these types until there are `window`, for at most `hold_s`; send them in reverse order."""

    window: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 2
    hold_s: Seconds = 1
    types: tuple[str, ...] = ("command",)


class Garbage(Fault, frozen=True, tag="garbage"):
    """Send a data frame that is no message before each message: each of a fixed set in turn, text and binary."""


class Oversize(Fault, frozen=True, tag="oversize"):
    """Send a well-formed message of this size and of the unknown type `oversize` before each message."""

    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=134_217_728)] = 20_000_000


class BinaryFrames(Fault, frozen=True, tag="binary_frames"):
    """Send messages in binary frames."""


# --- answers ----------------------------------------------------------------------------------------------------------


class RegisterInProgress(Fault, frozen=True, tag="register_in_progress"):
    """Send `register_in_progress` `times` times, `interval_s` apart, and the answer another `interval_s` later."""

    times: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    interval_s: Seconds = 0


class NoRegisterAnswer(Fault, frozen=True, tag="no_register_answer"):
    """Never answer a `register`."""


class RegisterError(Fault, frozen=True, tag="register_error"):
    """Answer a `register` with `error`: {`error`, `code` if given, and the fields of `extra`}."""

    error: str = "cluster name already exists"
    code: str = ""
    extra: dict[str, Any] = {}


class NotRegistered(Fault, frozen=True, tag="not_registered"):
    """Answer heartbeats, status reports and results with this `error`."""

    error: str = "cluster not registered"


class Forget(Fault, frozen=True, tag="forget"):
    """Delete all registrations, or those of `agent_id` or `cluster_id`, once. Ids assigned later are the same."""

    counted = False

    cluster_id: str | None = None


class NewClusterIds(Fault, frozen=True, tag="new_cluster_ids"):
    """Assign a new cluster id, also to an agent that sends one."""


class Gateway(Fault, frozen=True, tag="gateway"):
    """Set `gateway_ws_url` in `register_success` to `url`, or to this server's `/gateway/ws`."""

    url: str = ""


class CloseAfterRegister(Fault, frozen=True, tag="close_after_register"):
    """End the connection after `register_success`, as happens to one of two agents with the same identity."""

    how: How = How.CLOSE
    code: CloseCode = 1000


class NoHeartbeatAcks(Fault, frozen=True, tag="no_heartbeat_acks"):
    """Accept heartbeats without acknowledging them."""


AnyFault = (
    Refuse
    | HangHandshake
    | AcceptThenClose
    | Drop
    | Silent
    | Stalled
    | Slow
    | Delay
    | Duplicate
    | Reorder
    | Garbage
    | Oversize
    | BinaryFrames
    | RegisterInProgress
    | NoRegisterAnswer
    | RegisterError
    | NotRegistered
    | Forget
    | NewClusterIds
    | Gateway
    | CloseAfterRegister
    | NoHeartbeatAcks
)
