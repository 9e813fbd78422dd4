"""The faults that a controller can be told to show, each as the JSON object that `POST /control/faults` takes.

Common to all: `after_s` (starts later), `duration_s` (ends by itself), `count` (times it shows, where that can be
counted), and the limits `endpoint`, `connection`, `agent_id` (all given ones must fit). Several may be set at once.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, ClassVar

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
CloseCode = Annotated[int, msgspec.Meta(ge=1000, le=4999)]


class How(Enum):
    """How a connection ends."""

    CLOSE = "close"  # with a close frame
    ABORT = "abort"  # without one, by FIN (the kernel sends RST if something was unread)
    RST = "rst"  # by RST


class Endpoint(Enum):
    """Which of the two WebSocket endpoints."""

    CONTROLLER = "controller"
    GATEWAY = "gateway"


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all faults have in common. `counted` tells whether `count` has a meaning."""

    counted: ClassVar[bool] = True

    count: Positive | None = None
    after_s: Seconds = 0
    duration_s: Seconds | None = None
    endpoint: Endpoint | None = None
    connection: Positive | None = None
    agent_id: str | None = None


# --- the handshake ----------------------------------------------------------------------------------------------------


class Refuse(Fault, frozen=True, tag="refuse"):
    """Answer the handshake with this status instead, before the token is looked at."""

    status: Annotated[int, msgspec.Meta(ge=300, le=599)] = 503
    retry_after_s: int | None = None
    headers: dict[str, str] = {}
    error: str = ""


class HangHandshake(Fault, frozen=True, tag="hang_handshake"):
    """Do not answer the handshake until the fault ends."""

    counted = False


class AcceptThenClose(Fault, frozen=True, tag="accept_then_close"):
    """Accept the handshake and end the connection at once."""

    how: How = How.CLOSE
    code: CloseCode = 1011


# --- connections ------------------------------------------------------------------------------------------------------


class Drop(Fault, frozen=True, tag="drop"):
    """End connections: without `on` all that are open when the fault starts; with `on` the one on which a message of
    that type arrives, after it was handled, or instead of that (`discard`).
    """

    how: How = How.CLOSE
    code: CloseCode = 1001
    reason: Annotated[str, msgspec.Meta(max_length=30)] = ""
    on: str = ""
    discard: bool = False


class Silent(Fault, frozen=True, tag="silent"):
    """Neither read nor write, with the socket open; connections that open later only with `new_connections`."""

    counted = False

    new_connections: bool = False


class Stalled(Fault, frozen=True, tag="stalled"):
    """Answer pings and nothing else, as a dead application behind a live proxy does. Messages that arrive are
    discarded; messages to send wait. Connections that open later are spared without `new_connections`.
    """

    counted = False

    new_connections: bool = False


class Slow(Fault, frozen=True, tag="slow"):
    """Each message takes `latency_s`, and its size at `bytes_per_s`, in both directions."""

    counted = False

    latency_s: Seconds = 0
    bytes_per_s: Positive | None = None

    def takes_s(self, size_bytes: int) -> float:
        """How long a message of this size takes."""
        return self.latency_s + (size_bytes / self.bytes_per_s if self.bytes_per_s else 0)


# --- messages to the agent --------------------------------------------------------------------------------------------


class Delay(Fault, frozen=True, tag="delay"):
    """Send messages of these types (empty: all) later; others overtake them."""

    delay_s: Seconds
    types: tuple[str, ...] = ()


class Duplicate(Fault, frozen=True, tag="duplicate"):
    """Send each message of these types `times` times."""

    times: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 2
    types: tuple[str, ...] = ("command",)


class Reorder(Fault, frozen=True, tag="reorder"):
    """Hold messages of these types until there are `window` of them, at most `hold_s`, and send them last first."""

    window: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 2
    hold_s: Seconds = 1
    types: tuple[str, ...] = ("command",)


class Garbage(Fault, frozen=True, tag="garbage"):
    """Before each message send a data frame that is no message: each of a fixed set in turn, text and binary."""


class Oversize(Fault, frozen=True, tag="oversize"):
    """Before each message send a well-formed message of this size and of the unknown type `oversize`."""

    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=134_217_728)] = 20_000_000


class BinaryFrames(Fault, frozen=True, tag="binary_frames"):
    """Send messages in binary frames."""


# --- answers ----------------------------------------------------------------------------------------------------------


class RegisterInProgress(Fault, frozen=True, tag="register_in_progress"):
    """Send `register_in_progress` `times` times, `interval_s` apart, and the answer after another `interval_s`."""

    times: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    interval_s: Seconds = 0


class NoRegisterAnswer(Fault, frozen=True, tag="no_register_answer"):
    """Never answer a register."""


class RegisterError(Fault, frozen=True, tag="register_error"):
    """Answer a register with `error` {`error`, `code` if given, and what `extra` holds}."""

    error: str = "cluster name already exists"
    code: str = ""
    extra: dict[str, Any] = {}


class NotRegistered(Fault, frozen=True, tag="not_registered"):
    """Answer heartbeats, status reports and results with this `error`."""

    error: str = "cluster not registered"


class Forget(Fault, frozen=True, tag="forget"):
    """Forget the registrations, or those of `agent_id` or `cluster_id`, once. Ids handed out again stay the same."""

    counted = False

    cluster_id: str | None = None


class NewClusterIds(Fault, frozen=True, tag="new_cluster_ids"):
    """Hand out another cluster id than before, also to an agent that sends one."""


class Gateway(Fault, frozen=True, tag="gateway"):
    """Put `gateway_ws_url` into `register_success`: `url`, or this server's `/gateway/ws`."""

    url: str = ""


class CloseAfterRegister(Fault, frozen=True, tag="close_after_register"):
    """End the connection right after `register_success`, as happens to one of two agents with the same identity."""

    how: How = How.CLOSE
    code: CloseCode = 1000


class NoHeartbeatAcks(Fault, frozen=True, tag="no_heartbeat_acks"):
    """Take heartbeats without acknowledging them."""


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
