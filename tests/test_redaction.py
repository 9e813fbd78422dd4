"""Secrets are masked before a text is cut, in each form in which they are written, however many there are."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from shim.redaction import Redaction, without_secrets

TOKEN = "tok-" + "a1B2" * 47  # 192 characters: longer than most cuts leave room for


@pytest.mark.parametrize("lead", [0, 1, 8, 150, 190, 198, 199, 200, 500])
def test_a_secret_is_masked_before_the_text_is_cut(lead: int) -> None:
    shown = Redaction([TOKEN]).text("x" * lead + TOKEN + " tail", 200)
    assert len(shown) <= 200
    assert TOKEN[:8] not in shown


def test_a_text_that_fits_is_not_cut() -> None:
    assert Redaction([TOKEN]).text(f"bad token {TOKEN}", 200) == "bad token ***"
    assert Redaction().text("x" * 200, 200) == "x" * 200
    assert Redaction().text("x" * 201, 200) == "x" * 199 + "…"


@pytest.mark.parametrize("write", [str, json.dumps, repr, lambda text: quote(text, safe="")])
def test_a_secret_is_masked_as_it_is_quoted(write: object) -> None:
    secret = 'a"b\\c/d+e=f'
    assert callable(write)
    assert secret[3:] not in Redaction([secret]).text(f"at {write(secret)} end")
    assert "%2Bd" not in Redaction([secret]).text(f"at {write(secret)} end")


def test_many_secrets_that_begin_alike() -> None:
    redaction = Redaction(f"eyJhbGciOi.{number}" for number in range(2000))
    assert redaction.text("eyJhbGciOi.7 and eyJhbGciOi.1999, not eyJhbGciOi.x") == "*** and ***, not eyJhbGciOi.x"
    for number in range(2000):
        redaction.discard(f"eyJhbGciOi.{number}")
    assert redaction.text("eyJhbGciOi.7") == "eyJhbGciOi.7"


def test_basic_credentials_are_masked_like_bearer_tokens() -> None:
    assert Redaction().text("Authorization: Basic dXNlcjpwYXNz, Accept: *") == "Authorization: Basic ***, Accept: *"


def test_half_a_character_in_a_secret_is_survived() -> None:
    assert Redaction(["abcd\udc80"]).text("x abcd\udc80 y") == "x *** y"


OWN = "tok-0123456789-0123456789"
JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6IiJ9.eyJpc3MiOiJrdWJlcm5ldGVzIn0.c2ln"


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"invalid token {OWN}", "invalid token ***"),
        (f"invalid token {OWN[:15]}", "invalid token ***"),  # cut off by its sender
        (f"{OWN}/{OWN[:9]}?", "***/***?"),
        (f"?token={OWN[:3]}", "?token=***"),
        (f"bad service token {JWT}", "bad service token ***"),
        (f"bad service token {JWT[:20]}", "bad service token ***"),
        ("invalid token", "invalid token"),
        ("", ""),
    ],
)
def test_texts_of_others_are_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text, OWN) == shown
    assert without_secrets("a text", "") == "a text"
