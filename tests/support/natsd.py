"""Real NATS servers on loopback, and what a test does to them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
from nacl.signing import SigningKey
from nats.js.api import StreamInfo

from shim import settings
from shim.store import Post
from shim.store.jetstream import Layout, NatsStore
from tests.support.processes import free_port
from tests.support.stores import TIMEOUT_S, StoreClient

_NUMBERS = itertools.count()


class NatsServer:
    """One `nats-server` with JetStream in `directory`. `extra` is put into its configuration."""

    def __init__(self, directory: Path, extra: str = "", name: str = "n1") -> None:
        self.name = name
        self.port = free_port()
        self._directory = directory / name
        self._config = directory / f"{name}.conf"
        self._text = f"server_name: {name}\nhost: 127.0.0.1\nport: {self.port}\n"
        self._text += f'jetstream {{store_dir: "{self._directory}"}}\n'
        self._extra = extra
        self._process: subprocess.Popen[str] | None = None
        self._drain: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[str]:
        """The running server."""
        assert self._process is not None
        return self._process

    def start(self, extra: str | None = None) -> None:
        """Start it and wait until it takes clients."""
        self._config.write_text(self._text + (self._extra if extra is None else extra))
        self._process = subprocess.Popen(
            ["nats-server", "-c", str(self._config)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if "Server is ready" in line:
                # What it says from now on is of no interest, and must not fill the pipe.
                self._drain = threading.Thread(target=self._process.stderr.read, daemon=True)
                self._drain.start()
                return
        raise AssertionError("".join(said))

    def kill(self) -> None:
        """SIGKILL, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(TIMEOUT_S)
            if self._drain is not None:
                self._drain.join()
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    def signal(self, number: int) -> None:
        """SIGSTOP and SIGCONT: a server that is there and does not answer."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitpid(self._process.pid, os.WUNTRACED)


@contextlib.contextmanager
def running(*servers: NatsServer) -> Iterator[None]:
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.kill()


def cluster(directory: Path) -> list[NatsServer]:
    """Three servers that know each other; not started."""
    routes = [free_port() for _ in range(3)]
    everybody = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
    return [
        NatsServer(
            directory,
            f"cluster {{name: c, host: 127.0.0.1, port: {port}, routes: [{everybody}]}}\n",
            name=f"n{number}",
        )
        for number, port in enumerate(routes, 1)
    ]


def client(
    url: str,
    prefix: str = "agent-shim",
    replicas: int = 1,
    kind: Callable[..., NatsStore] = NatsStore,
    **configured: Any,
) -> StoreClient:
    """A client of a store that is yet to be opened."""
    store = settings.Store(url=url, replicas=replicas, **configured)

    def make(post: Post) -> NatsStore:
        return kind(store, post, None, Layout(prefix))

    return StoreClient(make)


@contextlib.contextmanager
def new_store(url: str) -> Iterator[Callable[[], StoreClient]]:
    """Makes clients of one store of its own, which is deleted in the end."""
    prefix = f"t{next(_NUMBERS)}"
    yield lambda: client(url, prefix)
    forget(url, prefix)


def forget(url: str, prefix: str) -> None:
    """Delete a store."""

    async def ask() -> None:
        connection = await nats.connect(url)
        try:
            js = connection.jetstream()
            for name in [*Layout(prefix).rows, Layout(prefix).journal]:
                with contextlib.suppress(nats.js.errors.NotFoundError):
                    await js.delete_stream(name)
        finally:
            await connection.close()

    asyncio.run(ask())


def encode(body: Any) -> bytes:
    """JSON as a row has it."""
    return json.dumps(body).encode()


class Account:
    """An operator, an account and a user of their own, as a NATS server with a memory resolver wants them."""

    def __init__(self) -> None:
        self._operator, self._account, self._user = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
        unlimited = {"subs": -1, "data": -1, "payload": -1}
        operator = self._jwt(self._operator, self._operator, _OPERATOR, {"type": "operator", "version": 2})
        limits = unlimited | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
        limits |= {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        account = self._jwt(
            self._operator, self._account, _ACCOUNT, {"type": "account", "version": 2, "limits": limits}, _OPERATOR
        )
        self._user_jwt = self._jwt(
            self._account, self._user, _USER, {"type": "user", "version": 2, **unlimited}, _ACCOUNT
        )
        name = _public(_ACCOUNT, self._account)
        everything = SigningKey.generate()
        system = self._jwt(self._operator, everything, _ACCOUNT, {"type": "account", "version": 2}, _OPERATOR)
        system_name = _public(_ACCOUNT, everything)
        self.configuration = f"operator: {operator}\nresolver: MEMORY\nsystem_account: {system_name}\n"
        self.configuration += f"resolver_preload: {{{name}: {account}, {system_name}: {system}}}\n"

    def credentials(self) -> str:
        """The user's credentials file."""
        raw = bytes([(18 << 3) | (_USER >> 5), (_USER & 31) << 3]) + bytes(self._user)
        return (
            f"-----BEGIN NATS USER JWT-----\n{self._user_jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{_checked(raw)}\n------END USER NKEY SEED------\n"
        )

    def _jwt(
        self, issuer: SigningKey, subject: SigningKey, kind: int, claims: dict[str, Any], by: int | None = None
    ) -> str:
        body = {
            "iss": _public(kind if by is None else by, issuer),
            "sub": _public(kind, subject),
            "iat": 1,
            "name": "test",
            "nats": claims,
        }
        text = f"{_base64({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_base64(body)}"
        signature = base64.urlsafe_b64encode(issuer.sign(text.encode()).signature).decode().rstrip("=")
        return f"{text}.{signature}"


_OPERATOR, _ACCOUNT, _USER = 14 << 3, 0, 20 << 3


def _public(kind: int, key: SigningKey) -> str:
    return _checked(bytes([kind]) + bytes(key.verify_key))


def _checked(raw: bytes) -> str:
    checksum = binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(raw + checksum).decode().rstrip("=")


def _base64(body: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(body).encode()).decode().rstrip("=")


def streams(url: str) -> dict[str, StreamInfo]:
    """What JetStream has."""

    async def ask() -> dict[str, StreamInfo]:
        connection = await nats.connect(url)
        try:
            return {str(info.config.name): info for info in await connection.jetstream().streams_info()}
        finally:
            await connection.close()

    return asyncio.run(ask())


def messages(url: str, stream: str) -> list[tuple[str, Any]]:
    """(subject, decoded body) of all messages of a stream."""

    async def ask() -> list[tuple[str, Any]]:
        connection = await nats.connect(url)
        found = []
        try:
            js = connection.jetstream()
            state = (await js.stream_info(stream)).state
            for seq in range(state.first_seq, state.last_seq + 1):
                with contextlib.suppress(nats.js.errors.NotFoundError):
                    message = await js.get_msg(stream, seq=seq)
                    found.append((str(message.subject), json.loads(message.data or b"null")))
            return found
        finally:
            await connection.close()

    return asyncio.run(ask())


def publish(url: str, subject: str, body: bytes) -> None:
    """Store a message from outside."""

    async def send() -> None:
        connection = await nats.connect(url)
        try:
            await connection.jetstream().publish(subject, body)
        finally:
            await connection.close()

    asyncio.run(send())
