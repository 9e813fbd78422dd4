"""PostgreSQL servers of Debian's packages, in temporary directories, run by a user that is nobody in particular."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import trustme

from shim.config import settings
from shim.store import CallThreadsafe, CommitProbe, Partition
from shim.store.postgres.database import prepare
from shim.store.postgres.engine import PATIENCE_S, PostgresStore
from shim.store.writer import UNOBSERVED
from tests.support.cleanup_process import delete_afterwards
from tests.support.processes import free_port

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
USER, PASSWORD = "shim", "database-hunter2"
_CONF = """
listen_addresses = '127.0.0.1'
unix_socket_directories = '{directory}'
port = {port}
max_connections = 60
wal_level = replica
max_wal_senders = 4
hot_standby = on
shared_buffers = 32MB
logging_collector = off
"""


class Postgres:
    """A server with a role `shim`; its data stay over stops and starts, until `remove()` or the end of this process.

    Its directory is not one of pytest's, which are for their owner alone.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="agent-shim-postgres-"))
        delete_afterwards(self.directory)
        self.data = self.directory / "data"
        self.port = free_port()
        self._made = 0
        self.give(self.directory)

    def remove(self) -> None:
        """End it whatever state it is in, and delete its files."""
        with suppress(FileNotFoundError):
            self.resume()
        self.stop("immediate")
        shutil.rmtree(self.directory)

    # --- life ---------------------------------------------------------------------------------------------------------

    def init(self, *conf: str) -> None:
        """Make the data directory; `conf` are lines of postgresql.conf."""
        subprocess.run(["cp", "-a", _template().data, self.data], check=True)
        text = _CONF.format(directory=self.directory, port=self.port)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(text + "\n".join(conf) + "\n")
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("host replication all 127.0.0.1/32 scram-sha-256\n")

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self.run("pg_ctl", "-D", self.data, "-w", "-t", "30", "-l", self.directory / "log", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it; `immediate` is a crash of the whole server."""
        self.run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop", check=False)

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill every process of the server at once."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def pause(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):  # a worker of the server may have ended meanwhile
                os.kill(pid, signal.SIGCONT)

    def pids(self) -> list[int]:
        """Its main process and the children."""
        main = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        return [main, *map(int, children)]

    def certify(self, certificate: trustme.LeafCert) -> None:
        """Serve TLS with this certificate from now on."""
        for name, blob in (("key", certificate.private_key_pem), ("crt", certificate.cert_chain_pems[0])):
            file = self.data / f"server.{name}"
            blob.write_to_path(str(file))
            file.chmod(0o600)
            self.give(file)
        self.sql("ALTER SYSTEM SET ssl = on")
        self.sql("SELECT pg_reload_conf()")
        self.restart()

    # --- standby ------------------------------------------------------------------------------------------------------

    @classmethod
    def standby_of(cls, primary: Postgres, *, synchronous: bool = True) -> Postgres:
        """A running standby; with `synchronous` the primary's commits wait for it from now on."""
        standby = cls()
        standby.run("pg_basebackup", "-D", standby.data, "-R", "-X", "stream", "-c", "fast", "-d",
                    f"{primary.url('postgres')}&application_name=standby")  # fmt: skip
        with (standby.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {standby.port}\nunix_socket_directories = '{standby.directory}'\n")
        standby.start()
        if synchronous:
            primary.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            primary.sql("SELECT pg_reload_conf()")
        return standby

    def promote(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-w", "promote")

    # --- databases ----------------------------------------------------------------------------------------------------

    def url(self, database: str = "shim", user: str = USER, password: str = PASSWORD) -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}?sslmode=disable"

    def create(self, name: str = "") -> str:
        """Make a database and return its URL."""
        self._made += 1
        name = name or f"db_{self._made}"
        self.sql(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, with the names of the shim's schema."""
        return query(self.url(database), statement)

    # --- the programs -------------------------------------------------------------------------------------------------

    def run(self, program: str, *args: object, check: bool = True) -> None:
        command = [str(BIN / program), *map(str, args)]
        done = subprocess.run(
            command, check=False, cwd="/", capture_output=True, text=True, timeout=120,
            user=user(), group=user(), extra_groups=() if user() else None,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{program}: {done.stdout}{done.stderr}")

    def give(self, path: Path) -> None:
        """Make the server's user the owner of a path."""
        if os.getuid() == 0:
            shutil.chown(path, user(), user())


def user() -> str | None:
    """PostgreSQL refuses to run as root."""
    return "postgres" if os.getuid() == 0 and any(each.pw_name == "postgres" for each in pwd.getpwall()) else None


@cache
def _template() -> Postgres:
    """Make the data directory that every server of this process begins with a copy of: initdb takes far longer."""
    made = Postgres()
    (made.directory / "password").write_text(PASSWORD)
    made.give(made.directory / "password")
    made.run("initdb", "-D", made.data, "-U", USER, "--auth=scram-sha-256", "-E", "UTF8", "--no-locale", "-N",
             f"--pwfile={made.directory / 'password'}")  # fmt: skip
    return made


@contextmanager
def running(*conf: str) -> Iterator[Postgres]:
    """A running server; `conf` are lines of its configuration."""
    server = Postgres()
    try:
        server.init(*conf)
        server.start()
        yield server
    finally:
        server.remove()


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement on a connection of its own."""
    return execute(url, statement)[1]


def execute(url: str, statement: str, values: Sequence[Any] | None = None) -> tuple[int, list[tuple[Any, ...]]]:
    """Run one statement on a connection of its own; how many rows it concerned, and what it returned."""
    with psycopg.connect(url, autocommit=True, options="-c search_path=agent_shim") as connection:
        cursor = connection.execute(statement, values or None)
        return cursor.rowcount, cursor.fetchall() if cursor.description else []


@contextmanager
def locking(url: str, statement: str) -> Iterator[int]:
    """Hold the locks of a statement in an open transaction; yields how many rows it has locked."""
    with psycopg.connect(url, options="-c search_path=agent_shim") as connection:
        yield connection.execute(statement).rowcount
        connection.rollback()


def lease(url: str, shard: int = 0, process: str = "p1") -> Partition:
    """Take a shard as `shim.cluster` does."""
    statement = (
        f"INSERT INTO leases (shard, holder, fence) VALUES ({shard}, '{process}', 1)"
        f" ON CONFLICT (shard) DO UPDATE SET holder = '{process}', fence = leases.fence + 1 RETURNING fence"
    )
    query(
        url,
        "INSERT INTO cluster (shards, owner_key, secret, agreed)"
        f" VALUES (16, decode('{secrets.token_hex(32)}', 'hex'), 's', '{{}}') ON CONFLICT DO NOTHING",
    )
    ((fence,),) = query(url, statement)
    return Partition(shard, fence, process)


def store(
    url: str,
    post: CallThreadsafe,
    probe: CommitProbe = UNOBSERVED,
    shard: int = 0,
    process: str = "p1",
    patience_s: float = PATIENCE_S,
) -> PostgresStore:
    """The store of a shard, its schema made and its lease taken."""
    configured = settings.Store(url=url)
    prepare(configured)
    return PostgresStore(configured, post, probe, lease(url, shard, process), patience_s)
