"""The JetStream server as the store sees it: bounded requests, and errors that say what may be done about them.

It imports `nats`, and is itself imported where `store.url` is set, never otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from shim import settings
from shim.errors import StoreError
from shim.store.jetstream.credentials import read_credentials

ANSWER_S = 2.0
CONNECT_S = 3.0
PING_INTERVAL_S = 5
_CLOSE_S = 1.0
_WRONG_SEQUENCE = frozenset({10071, 10164})
_NO_REPLICAS = 10074
_NO_SUCH_MESSAGE = re.compile(r"not found|no message found|EOF$")
_REFUSED = "the NATS server refuses the credentials"
_NO_TLS = "the NATS server has no TLS, store.url asks for it"
_NOT_TRUSTED = "the NATS server's certificate is not trusted: see store.ca_file"
_NO_FILE = "store.credentials_file or store.ca_file cannot be read"
_NO_CREDENTIALS = "store.credentials_file holds no credentials"
_LASTING = frozenset({_REFUSED, _NO_TLS, _NOT_TRUSTED, _NO_FILE, _NO_CREDENTIALS})
_FETCH = 64
FEW = 2000
_WAYS = 16
# Longer than a store takes to be read: nothing is acknowledged, and nothing must come twice.
_ACK_WAIT_S = 3600.0


class Unavailable(StoreError):
    """No answer, or none yet: what was asked may have happened or not, and may be asked again."""


class Rejected(Unavailable):
    """The server is there and will not have us: waiting is no use before somebody has done something."""


class Conflict(StoreError):
    """The sequence was not the expected one; nothing was written."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of a stream."""

    seq: int
    subject: str
    body: bytes


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Errors of the client as `StoreError`s."""
    try:
        yield
    except nats.js.errors.ServiceUnavailableError as error:
        raise Unavailable("JetStream is not available") from error
    except nats.js.errors.NoStreamResponseError as error:
        raise Unavailable("no stream answers") from error
    except nats.js.errors.APIError as error:
        if error.err_code in _WRONG_SEQUENCE:
            raise Conflict("the sequence is another") from error
        raise StoreError(f"JetStream refused: error {error.err_code}") from error
    except (nats.errors.Error, OSError, EOFError, TimeoutError) as error:
        raise Unavailable(f"the NATS server does not answer: {type(error).__name__}") from None


class _Client(Client):
    """A client that sends nothing to a server without TLS where the URL asks for it."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        server = self._current_server
        if initial_connection and server is not None and server.uri.scheme == "tls" and not info.get("tls_required"):
            raise nats.errors.Error("nats: no TLS")
        await super()._process_info(info, initial_connection)


async def _close(client: Client) -> None:
    """Close; a TLS connection whose handshake failed would never be."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_CLOSE_S):
            await client.close()


class Server:
    """One connection at a time, made anew where it was lost. Everything raises `StoreError`."""

    def __init__(self, configured: settings.Store) -> None:
        self._servers = [each.strip() for each in configured.url.split(",")]
        self._credentials_file = configured.credentials_file
        self._ca_file = configured.ca_file
        self._client: _Client | None = None
        self._reason = ""
        # What the server takes in one message; known once `connect` has been.
        self.max_payload_bytes = 0

    async def connect(self) -> None:
        """Make sure that there is a connection. Raises `Unavailable`."""
        if self._client is not None and self._client.is_connected:
            return
        await self.close()
        client = _Client()
        self._reason = ""
        try:
            async with asyncio.timeout(CONNECT_S):
                await client.connect(**self._options())
        except (nats.errors.Error, OSError, TimeoutError, EOFError, ValueError) as error:
            await _close(client)
            reason = self._why(error)
            raise (Rejected(reason) if reason in _LASTING else Unavailable(reason)) from None
        self._client = client
        self.max_payload_bytes = client.max_payload

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "servers": self._servers,
            "error_cb": self._note,
            "name": "agent-shim",
            # Publishing again is decided here, by sequence: the client must not keep anything for later.
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": 0,
            "connect_timeout": CONNECT_S,
            "ping_interval": PING_INTERVAL_S,
        }
        if any(urlsplit(each).scheme == "tls" for each in self._servers):
            options["tls"] = ssl.create_default_context(cafile=self._ca_file or None)
        if self._credentials_file:
            # Read for every connection: what was renewed is taken up by itself.
            credentials = read_credentials(self._credentials_file)
            options["user_jwt_cb"] = lambda: bytearray(credentials.jwt.encode())
            options["signature_cb"] = credentials.sign
        return options

    async def _note(self, error: Exception) -> None:
        self._reason = self._why(error)

    def _why(self, error: Exception) -> str:
        """A fixed text: an error of the client may quote what it was given."""
        text = str(error)
        if "Authorization" in text:
            return _REFUSED
        if "no TLS" in text:
            return _NO_TLS
        if isinstance(error, ssl.SSLError):
            return _NOT_TRUSTED
        if isinstance(error, (nats.errors.NoServersError, TimeoutError)) and self._reason:
            return self._reason
        if isinstance(error, (FileNotFoundError, PermissionError)):
            return _NO_FILE
        if isinstance(error, ValueError):
            return _NO_CREDENTIALS
        return f"the NATS server cannot be reached: {type(error).__name__}"

    async def close(self) -> None:
        """Drop the connection, if there is one."""
        client, self._client = self._client, None
        if client is not None:
            await _close(client)

    def connected(self) -> Client:
        """The client of the connection that there is. Raises `Unavailable`."""
        if self._client is None or not self._client.is_connected:
            raise Unavailable("there is no connection to the NATS server")
        return self._client

    async def ensure(self, streams: Iterable[dict[str, Any]]) -> None:
        """Create streams, or set their number of replicas where they exist."""
        js = self.connected().jetstream(timeout=CONNECT_S)
        for configuration in streams:
            wanted = StreamConfig(**configuration)
            name = str(wanted.name)
            try:
                with translated():
                    try:
                        found = (await js.stream_info(name)).config
                    except nats.js.errors.NotFoundError:
                        found = (await js.add_stream(wanted)).config
                    if found.num_replicas != wanted.num_replicas:
                        await js.update_stream(found.evolve(num_replicas=wanted.num_replicas))
            except StoreError as error:
                cause = error.__cause__
                if isinstance(cause, nats.js.errors.APIError) and cause.err_code == _NO_REPLICAS:
                    raise StoreError(
                        f"the NATS servers cannot hold {wanted.num_replicas} replicas: see store.replicas"
                    ) from None
                raise

    async def publish(self, subject: str, body: bytes, headers: dict[str, str], answer_s: float = ANSWER_S) -> int:
        """Store a message; its sequence. A duplicate (by `Nats-Msg-Id`) has the sequence of the first."""
        js = self.connected().jetstream()
        with translated():
            seq = (await js.publish(subject, body, timeout=answer_s, headers=headers)).seq
        if not seq:
            raise Unavailable("a duplicate of what the servers have not agreed upon yet")
        return seq

    async def last_sequence(self, stream: str) -> int:
        """The highest sequence that a stream ever had."""
        js = self.connected().jetstream(timeout=ANSWER_S)
        with translated():
            return (await js.stream_info(stream)).state.last_seq

    async def message(self, stream: str, seq: int = 0, subject: str = "") -> Stored | None:
        """The message with this sequence, or the last one of this subject."""
        js = self.connected().jetstream(timeout=ANSWER_S)
        with translated():
            try:
                found = await js.get_msg(stream, seq=seq or None, subject=subject or None)
            except nats.js.errors.NotFoundError:
                return None
        return Stored(found.seq or 0, found.subject or "", found.data or b"")

    async def delete(self, stream: str, seq: int) -> None:
        """Delete the message with this sequence, if it is there."""
        client = self.connected()
        request = json.dumps({"seq": seq, "no_erase": True}).encode()
        with translated():
            answer = await client.request(f"$JS.API.STREAM.MSG.DELETE.{stream}", request, timeout=ANSWER_S)
        error = json.loads(answer.data).get("error", {})
        if error.get("code") == 503:
            raise Unavailable("JetStream is not available")
        # The code of a message that is not there is also that of a delete which failed.
        if error and not _NO_SUCH_MESSAGE.search(error.get("description", "")):
            raise StoreError(f"JetStream refused to delete: error {error.get('err_code')}")

    async def purge(self, stream: str, before: int) -> None:
        """Delete what is older than this sequence."""
        js = self.connected().jetstream(timeout=ANSWER_S)
        with translated():
            await js.purge_stream(stream, seq=before)

    async def read(self, stream: str, until: int) -> list[Stored]:
        """All messages of a stream up to this sequence, which exists.

        Few are asked for one by one: that needs the stream's own leader only, a consumer those of the whole cluster.
        """
        js = self.connected().jetstream(timeout=CONNECT_S)
        with translated():
            state = (await js.stream_info(stream)).state
        if state.messages > FEW:
            return await self._consume(stream, until)
        share = max(1, -(-(until + 1 - state.first_seq) // _WAYS))
        starts = range(state.first_seq, until + 1, share)
        parts = await asyncio.gather(*(self._walk(stream, start, min(start + share, until + 1)) for start in starts))
        return [each for part in parts for each in part]

    async def _walk(self, stream: str, start: int, end: int) -> list[Stored]:
        """The messages from one sequence to before another."""
        js = self.connected().jetstream(timeout=CONNECT_S)
        found: list[Stored] = []
        with translated(), contextlib.suppress(nats.js.errors.NotFoundError):
            while start < end:
                message = await js.get_msg(stream, seq=start, subject=">", next=True)
                seq = message.seq or end
                if seq < end:
                    found.append(Stored(seq, message.subject or "", message.data or b""))
                start = seq + 1
        return found

    async def _consume(self, stream: str, until: int) -> list[Stored]:
        """By one consumer that exists only meanwhile.

        It may live on a server that lags behind the others: only `until` itself tells that all has come.
        """
        js = self.connected().jetstream(timeout=CONNECT_S)
        # By name: what a reader that died left behind would be in the way on a work-queue stream.
        name = "opening"
        config = ConsumerConfig(
            durable_name=name, ack_policy=AckPolicy.EXPLICIT, ack_wait=_ACK_WAIT_S, max_ack_pending=-1
        )
        with translated():
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await js.delete_consumer(stream, name)
            await js.add_consumer(stream, config)
            subscription = await js.pull_subscribe_bind(name, stream)
            found: list[Stored] = []
            while not found or found[-1].seq < until:
                messages = await subscription.fetch(_FETCH, timeout=CONNECT_S)
                found += [Stored(each.metadata.sequence.stream, each.subject, each.data) for each in messages]
            await subscription.unsubscribe()
            await js.delete_consumer(stream, name)
        return found
