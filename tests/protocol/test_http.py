"""URL arithmetic of the upstream side."""

from __future__ import annotations

import pytest

from shim.protocol.http import host_of, http_url, origin_of, under, with_query, ws_url


@pytest.mark.parametrize(
    "base,path,expected",
    [
        ("https://api.example.com", "/a/ws", "wss://api.example.com/a/ws"),
        ("http://127.0.0.1:8000", "/a/ws", "ws://127.0.0.1:8000/a/ws"),
        ("WSS://API.example.com:443/", "a/ws", "wss://api.example.com:443/a/ws"),
        ("ws://h/base/", "/ws", "ws://h/base/ws"),
        ("https://h/base%2Fx?tenant=a%26b&c", "/ws", "wss://h/base%2Fx/ws?tenant=a%26b&c"),
        ("https://[::1]:9/x#part", "/ws", "wss://[::1]:9/x/ws"),
        ("https://user:secret@h/x", "/ws", "wss://h/x/ws"),
        ("wss://gateway/given?x=1", "", "wss://gateway/given?x=1"),
        ("wss://h/a/ws", "/a/ws", "wss://h/a/ws"),
        ("wss://h/base/a/ws/?x=1", "/a/ws", "wss://h/base/a/ws/?x=1"),
        ("wss://h/xa/ws", "/a/ws", "wss://h/xa/ws/a/ws"),
        ("https://BÜCHER.example:1", "/ws", "wss://xn--bcher-kva.example:1/ws"),
        ("https://h.example.", "/ws", "wss://h.example./ws"),
    ],
)
def test_ws_url_keeps_the_base_and_changes_the_scheme(base: str, path: str, expected: str) -> None:
    assert ws_url(base, path) == expected


@pytest.mark.parametrize("base", ["ftp://h", "api.example.com", "https://", "https://h:99999", "https://[::1", ""])
def test_ws_url_refuses_without_echo(base: str) -> None:
    with pytest.raises(ValueError, match=r"URL|scheme|host") as caught:
        ws_url(base + "?token=hush" if base else base, "/ws")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "base,expected",
    [
        ("https://h", "https://h"),
        ("wss://h/a/ws", "https://h"),
        ("ws://h:1/base/a/ws?x=1", "http://h:1/base?x=1"),
        ("https://h/base", "https://h/base"),
    ],
)
def test_the_http_api_is_where_the_websocket_endpoint_is(base: str, expected: str) -> None:
    assert http_url(base, "/a/ws") == expected


@pytest.mark.parametrize(
    "base,target,expected",
    [
        ("https://h", "/x?a=%2F", "https://h/x?a=%2F"),
        ("https://h/base/", "/x", "https://h/base/x"),
        ("https://h/base?k=1", "/x", "https://h/base/x?k=1"),
        ("https://h?k=1", "/x?a", "https://h/x?a&k=1"),
    ],
)
def test_a_target_under_a_base_keeps_both_queries(base: str, target: str, expected: str) -> None:
    assert under(base, target) == expected


def test_with_query_appends_and_escapes() -> None:
    assert with_query("ws://h/p", []) == "ws://h/p"
    assert with_query("ws://h/p", [("token", "a b&=/+")]) == "ws://h/p?token=a%20b%26%3D%2F%2B"
    assert with_query("ws://h/p?x=%2f", [("t", "1"), ("u", "2")]) == "ws://h/p?x=%2f&t=1&u=2"
    assert with_query("ws://h/p?", [("t", "1")]) == "ws://h/p?t=1"


def test_what_may_be_logged_of_a_url() -> None:
    assert origin_of("https://u:pw@h.example:8443/p?token=hush") == "https://h.example:8443"
    assert origin_of("ws://[::1]/p") == "ws://[::1]"
    assert origin_of("ws://[::1") == "?"
    assert host_of("wss://A.Example/x") == "a.example"
    assert host_of("wss://Bücher.example./x") == host_of("wss://xn--bcher-kva.example")
    assert host_of("ws://[0:0::1]") == "::1"
    assert host_of("ws://[::1") == ""
