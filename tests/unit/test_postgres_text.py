r"""Text for Postgres: NUL and lone surrogates are written as escapes, and come back."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpc_server.adapters.postgres_text import from_text, to_json, to_text
from tests import records as make

tricky = st.text(st.sampled_from("\\u0\x00dD8a9f\ud800\udfff"), max_size=16)


@given(make.text | tricky)
@example("\\\x00")
@example("\\u0000")
@example("\\\\u0000\x00")
@example("\ud83d\ude00")
def test_any_text_comes_back_as_it_was(text: str) -> None:
    stored = to_text(text)
    stored.encode()  # Postgres wants UTF-8 …
    assert "\x00" not in stored  # … without NUL
    assert from_text(stored) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\\")))
def test_ordinary_text_is_stored_as_it_is(text: str) -> None:
    assert to_text(text) == text


def test_ordinary_backslashes_are_left_alone() -> None:
    assert to_text(r"C:\users\new \\ \d+ \u00e9") == r"C:\users\new \\ \d+ \u00e9"


def test_nul_is_written_as_its_escape() -> None:
    assert to_text("a\x00b\ud800") == r"a\u0000b\ud800"


@given(make.json_objects)
def test_json_comes_back_as_it_was(value: dict[str, object]) -> None:
    assert json.loads(to_json(value)) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_a_value_error(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json({"value": value})
