"""Parameters of a connection: password, TLS, hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from shim.config import settings
from shim.errors import StoreError

pytest.importorskip("psycopg")

from shim.store.postgres.database import prepare
from shim.store.postgres.dsn import conninfo
from tests.support import postgres as pg

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(240)]


def test_a_password_from_a_file_is_read_for_each_connection(pg_url: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("old-hunter2")
    configured = settings.Store(url=pg_url.replace(f":{pg.PASSWORD}", ""), password_file=str(file))
    with pytest.raises(StoreError, match=r"store\.password_file"):
        prepare(configured)
    file.write_text(pg.PASSWORD + "\n")
    prepare(configured)


@pytest.mark.parametrize(
    "store, expected",
    [
        ({"url": "postgresql://h.example/d"}, "sslmode=verify-full"),
        ({"url": "postgresql://h.example/d", "ca_file": "/ca"}, "sslrootcert=/ca"),
        ({"url": "postgresql://h.example/d?sslmode=prefer", "allow_insecure": True}, "sslmode=prefer"),
        ({"url": "postgresql://127.0.0.1/d", "ca_file": "/ca"}, "sslmode=verify-full"),
        ({"url": "postgresql://h/d", "client_cert_file": "/c", "client_key_file": "/k"}, "sslkey=/k"),
        ({"url": "postgresql://a.example,b.example/d"}, "target_session_attrs=read-write"),
    ],
)
def test_connection_parameters(store: dict[str, Any], expected: str) -> None:
    assert expected in conninfo(settings.Store(**store), "agent-shim x").split()


@pytest.mark.parametrize(
    "url, environment",
    [
        ("postgresql://127.0.0.1/d?hostaddr=10.0.0.9&sslmode=disable", {}),
        ("postgresql://db.localhost/d", {}),
        ("postgresql:///d?service=x", {}),
        ("postgresql:///d", {"PGHOST": "h.example"}),
        ("postgresql:///d?host=127.0.0.1", {"PGHOSTADDR": "10.0.0.9"}),
        ("postgresql:///d", {"PGSERVICE": "x"}),
    ],
)
def test_wherever_the_host_is_named_another_machine_needs_tls(
    url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "sslmode=verify-full" in conninfo(settings.Store(url=url), "agent-shim x").split()


def test_the_environment_does_not_make_a_local_database_a_remote_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "h.example")
    assert "sslmode" not in conninfo(settings.Store(url="postgresql://localhost/d"), "agent-shim x")


def test_a_database_off_this_machine_must_prove_who_it_is(server: pg.Postgres, tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    for name, authority in (("ours", ours), ("theirs", theirs)):
        authority.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    server.certify(ours.issue_cert("127.0.0.1"))
    url = server.create("shim").replace("?sslmode=disable", "")
    for ca, said in (("ours", ""), ("theirs", "certificate")):
        configured = settings.Store(url=url, ca_file=str(tmp_path / f"{ca}.pem"))
        if not said:
            prepare(configured)
            continue
        with pytest.raises(StoreError, match=said):
            prepare(configured)
    server.certify(ours.issue_cert("elsewhere.example"))
    with pytest.raises(StoreError, match="does not match host name"):
        prepare(settings.Store(url=url, ca_file=str(tmp_path / "ours.pem")))
