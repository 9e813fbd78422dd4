"""Hosts on this machine: one rule for what tokens and commands may reach without TLS."""

import pytest

from shim.hosts import host_and_port, is_loopback, is_this_machine


@pytest.mark.parametrize(
    "host,expected",
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("localhost.", False),
        ("a.localhost", False),
        ("127.0.0.1.", False),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["", "/run/postgresql", "@socket", "localhost", "127.0.0.2", "::1", "[::1]"])
def test_a_database_on_this_machine_is_recognised_by_loopback_and_by_the_path_of_a_socket(host: str) -> None:
    assert is_this_machine(host)


@pytest.mark.parametrize(
    "host",
    [
        "db",
        "10.0.0.1",
        "localhost.example.com",
        "db.localhost",
        "localhost.",
        "a,b.localhost",
        "127.0.0.1%2Cdb",
        "\uff11\uff12\uff17.0.0.1",
    ],
)
def test_a_database_elsewhere_is_not_on_this_machine(host: str) -> None:
    assert not is_this_machine(host)


@pytest.mark.parametrize(
    "host,expected", [("127.0.0.1", "127.0.0.1:80"), ("name", "name:80"), ("::1", "[::1]:80"), ("[::1]", "[::1]:80")]
)
def test_host_and_port(host: str, expected: str) -> None:
    assert host_and_port(host, 80) == expected
