"""What is found in a text: each kind where it is, and nothing where it only looks so."""

from __future__ import annotations

import itertools
import random
import string
import time

import pytest

from grpc_server.guard.private_text import Finder

FINDER = Finder()


def found(text: str) -> list[tuple[str, str]]:
    return [(text[start:end], kind) for start, end, kind in FINDER.find(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to Zoë.Ø+x@mail.example.co.uk.", [("Zoë.Ø+x@mail.example.co.uk", "EMAIL")]),
        (
            "4111 1111 1111 1111, 5500-0000-0000-0004",
            [("4111 1111 1111 1111", "CARD"), ("5500-0000-0000-0004", "CARD")],
        ),
        ("to GB82 WEST 1234 5698 7654 32 today", [("GB82 WEST 1234 5698 7654 32", "IBAN")]),
        ("DE89370400440532013000", [("DE89370400440532013000", "IBAN")]),
        (
            "call +49 30 901820 or +1 (415) 555-2671!",
            [("+49 30 901820", "PHONE"), ("+1 (415) 555-2671", "PHONE")],
        ),
        ("SSN 123-45-6789.", [("123-45-6789", "SSN")]),
        ("from 8.8.8.8, 2001:4860:4860::8888", [("8.8.8.8", "IP"), ("2001:4860:4860::8888", "IP")]),
        ("AKIAIOSFODNN7EXAMPLE", [("AKIAIOSFODNN7EXAMPLE", "AWS_ACCESS_KEY")]),
        ("ghp_" + "aB1" * 12, [("ghp_" + "aB1" * 12, "GITHUB_TOKEN")]),
        ("npm_" + "a1" * 18, [("npm_" + "a1" * 18, "NPM_TOKENS")]),
        ("key=sk-proj-" + "aB3" * 12, [("sk-proj-" + "aB3" * 12, "OPENAI_TOKEN")]),
        ("https://user:hunter2@host/x", [("hunter2", "BASIC_AUTH_CREDENTIALS")]),
        ("Bearer eyJhbGci.eyJzdWIi.c2ln_x", [("eyJhbGci.eyJzdWIi.c2ln_x", "JSON_WEB_TOKEN")]),
        ("al_abcdefghijkl_" + "A" * 43, [("al_abcdefghijkl_" + "A" * 43, "AGENT_LOOP_TOKEN")]),
        ("xoxb-1-a", [("xoxb-1-a", "SLACK_TOKEN")]),
    ],
)
def test_each_kind_is_found_where_it_is(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0 \ud800",
        "What is the weather in Oslo on 2026-11-24 at 12:30:45?",
        "order 4111111111111112, 1111111111111111, 1234567890123",  # no card's check digit, or no card's
        "GB00 WEST 1234 5698 7654 32",
        "+1 000 000 0000 and 555-2671",
        "000-12-3456, 666-12-3456, 123-00-4567",
        "127.0.0.1, 10.1.2.3, 192.168.0.1, 999.1.1.1, 1.2.3, ::1, a::b::c",
        "user@localhost, @someone, a@b",
        '{"type": "object", "properties": {"calculate_circumference_of_circle": {"type": "number"}}}',
        "The key to success is a secret: practise.",
    ],
)
def test_what_only_looks_so_is_left(text: str) -> None:
    assert found(text) == []


@pytest.mark.parametrize("line", ["\n", "\\n"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_private_key_is_found_to_its_end_or_to_where_it_is_cut_off(line: str, cut: bool) -> None:
    body = f"-----BEGIN RSA PRIVATE KEY-----{line}MIIEpAIBAAKCAQEA{line}abc+/={line}"
    key = body if cut else f"{body}-----END RSA PRIVATE KEY-----"
    ((text, kind),) = found(f"here: {key}")
    assert (text, kind) == (key, "PRIVATE_KEY")


def test_of_two_that_overlap_the_union_is_taken_once() -> None:
    ((text, kind),) = found("https://user:bob@example.com@host")
    assert kind == "EMAIL" or kind == "BASIC_AUTH_CREDENTIALS"
    assert "bob" in text


PIECES = (
    "xoxb-1-",
    "//",
    "://",
    "eyJ",
    "sk-",
    "a@",
    "a.",
    "1 ",
    "+1",
    "GB82",
    "cloudant_key:",
    "aws key '",
    ":",
    "xoxb-1-",
)


@pytest.mark.parametrize("piece", [*PIECES, "-----BEGIN PRIVATE KEY-----", "//a/:_authToken="])
def test_no_text_takes_time_by_the_square_of_its_length(piece: str) -> None:
    """128 KiB take 0.1 s; the patterns that are not used took minutes for some of these."""
    started = time.process_time()
    FINDER.find((piece * (128 << 10))[: 128 << 10])
    assert time.process_time() - started < 5


def test_random_text_of_a_caller_is_scanned_whole() -> None:
    text = "".join(random.Random(7).choices(string.printable, k=20_000))
    spans = FINDER.find(f"{text} bob@example.com {text}")
    assert any(kind == "EMAIL" for _, _, kind in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
