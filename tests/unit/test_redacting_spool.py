"""What reaches the spool: records without what must not be kept, and whole in every other respect."""

from __future__ import annotations

import asyncio
import json
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_server.adapters.record_json import record_from_json, record_to_json
from grpc_server.adapters.redacting_spool import Mode, RedactingSpool, read_key
from grpc_server.adapters.redaction_process import Span, UnscannedError
from grpc_server.domain.errors import Precondition, SpoolFull
from grpc_server.domain.plain import message_from_plain, message_to_plain, request_from_plain
from grpc_server.domain.types import (
    Feedback,
    InferenceEnded,
    LogRecord,
    Message,
    Role,
    ServerStarted,
    ToolCall,
)
from grpc_server.domain.withheld import changed, without_text
from tests import records as make
from tests.fakes import FakeSpool

KEY = b"k" * 32


class FakeFinder:
    """Finds `bob@example.com` and the digits of a card; keeps what it was asked, and fails when told to."""

    def __init__(self, *, broken: bool = False) -> None:
        self.asked: list[list[str]] = []
        self.broken = broken

    async def find(self, texts: Sequence[str]) -> list[list[Span]]:
        self.asked.append(list(texts))
        if self.broken:
            raise UnscannedError
        kinds = {"b": "EMAIL", "B": "EMAIL", "4": "CARD"}
        pattern = re.compile(r"(?i:bob@example\.com)|4111[ -]?1111[ -]?1111[ -]?1111")
        return [[(*one.span(), kinds[one[0][0]]) for one in pattern.finditer(text)] for text in texts]


def bench(mode: Mode = "hash", **options: Any) -> tuple[RedactingSpool, FakeSpool, FakeFinder]:
    spool, finder = FakeSpool(), FakeFinder(**options)
    return RedactingSpool(spool, finder, mode, KEY), spool, finder


def said(content: str, *calls: ToolCall) -> Message:
    return Message(Role.ASSISTANT, content, tool_calls=calls)


BOB = "bob@example.com"
REQUEST = {
    "messages": [
        {"role": "user", "content": "Mail bob@example.com", "tool_calls": [], "tool_name": ""},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "name": "bob@example.com",
                    "arguments": {"bob@example.com": [BOB, 4111111111111111, 7]},
                }
            ],
            "tool_name": "",
        },
    ],
    "tools": [
        {"name": "mail", "description": "for bob@example.com", "parameters": {"const": "4111 1111 1111 1111"}}
    ],
    "tool_choice": "auto",
    "sampling": {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 1,
        "max_tokens": 9,
        "seed": None,
        "stop": [BOB],
    },
    "response_schema": None,
}


async def kept(spool: RedactingSpool, inner: FakeSpool, record: LogRecord) -> Any:
    await spool.append(record)
    return inner.records[-1]


async def test_texts_are_masked_and_structure_stays() -> None:
    spool, inner, _ = bench("mask")
    start = await kept(spool, inner, make.started(request=REQUEST, session_id="bob@example.com"))
    assert start.session_id == "bob@example.com"
    first, second = start.request["messages"]
    assert first == {"role": "user", "content": "Mail <EMAIL>", "tool_calls": [], "tool_name": ""}
    (call,) = second["tool_calls"]
    assert call == {"name": "bob@example.com", "arguments": {"bob@example.com": ["<EMAIL>", "<CARD>", 7]}}
    assert start.request["tools"] == [
        {"name": "mail", "description": "for <EMAIL>", "parameters": {"const": "<CARD>"}}
    ]
    assert start.request["sampling"]["stop"] == ["<EMAIL>"]
    assert start.redacted == {"CARD": 2, "EMAIL": 4}
    request_from_plain(start.request)


async def test_a_hash_is_the_same_for_the_same_value_and_says_nothing_without_the_key() -> None:
    spool, inner, _ = bench()
    start = await kept(spool, inner, make.started(request=REQUEST))
    answer = {"role": "assistant", "content": "BOB@example.com, 4111-1111-1111-1111"}
    end = await kept(spool, inner, make.ended(start.id, answer=answer))
    (name,) = re.findall(r"<EMAIL:[0-9a-f]{12}>", start.request["messages"][0]["content"])
    assert end.answer["content"].startswith(name)
    assert start.request["tools"][0]["parameters"]["const"] in end.answer["content"]
    other = RedactingSpool(inner, FakeFinder(), "hash", b"x" * 32)
    assert name not in str(await kept(other, inner, make.started(request=REQUEST)))


async def test_comments_and_demonstrations_are_redacted() -> None:
    spool, inner, _ = bench("mask")
    comment = await kept(spool, inner, make.feedback(make.new_id(), comment="ask bob@example.com"))
    assert (comment.comment, comment.redacted) == ("ask <EMAIL>", {"EMAIL": 1})
    shown = said("", ToolCall("mail", {"to": "bob@example.com"}))
    demonstration = await kept(spool, inner, make.feedback(make.new_id(), demonstration=shown))
    assert demonstration.demonstration == said("", ToolCall("mail", {"to": "<EMAIL>"}))
    score = make.feedback(make.new_id(), score=0.5)
    assert await kept(spool, inner, score) == score


async def test_an_answer_that_is_json_stays_json() -> None:
    spool, inner, _ = bench("mask")
    text = '{"card": 4111111111111111, "other": "4111111111111111", "to": "bob@example.com"}'
    end = await kept(spool, inner, make.ended(make.new_id(), answer={"role": "assistant", "content": text}))
    assert json.loads(end.answer["content"]) == {"card": "<CARD>", "other": "<CARD>", "to": "<EMAIL>"}


async def test_what_nobody_could_scan_is_not_kept() -> None:
    spool, inner, _ = bench(broken=True)
    start = await kept(spool, inner, make.started(request=REQUEST))
    assert "example" not in json.dumps([m["content"] for m in start.request["messages"]])
    assert start.request["messages"][0]["content"] == "<UNSCANNED>"
    assert start.request["messages"][1]["content"] == ""
    assert start.redacted == {"UNSCANNED": 6}


async def test_where_redaction_is_off_nothing_is_asked_or_changed() -> None:
    spool, inner, finder = bench("off")
    record = make.started(request=REQUEST)
    assert await kept(spool, inner, record) == record
    assert finder.asked == []


async def test_what_holds_nothing_is_left_as_it_is_and_counted_as_nothing() -> None:
    counted: list[tuple[str, int]] = []
    inner = FakeSpool()
    spool = RedactingSpool(inner, FakeFinder(), "hash", KEY, redacted=lambda *told: counted.append(told))
    record = make.started()
    assert await kept(spool, inner, record) is record
    assert counted == []
    await spool.append(make.started(request=REQUEST))
    assert counted == [("CARD", 2), ("EMAIL", 4)]


# Callers whose text is not kept


async def test_of_a_caller_without_text_only_counts_and_a_digest_are_kept() -> None:
    spool, inner, finder = bench("off")
    start = await kept(spool, inner, make.started(request=REQUEST, text=False))
    answer = {"role": "assistant", "content": "secret words"}
    end = await kept(spool, inner, make.ended(start.id, answer=answer))
    told = start.request["withheld"]
    assert (told["messages"], told["tools"], len(told["digest"])) == (2, 1, 64)
    assert told["characters"] > 50
    assert end.answer["withheld"]["characters"] == len("secret words")
    assert end.usage == make.ended(start.id).usage
    text = record_to_json(start) + record_to_json(end)
    assert not re.search("bob|mail|4111|secret words", text)
    request_from_plain(start.request)
    message_from_plain(end.answer)
    assert finder.asked == []
    assert spool._without_text == set()
    again = await kept(spool, inner, make.started(request=REQUEST, text=False))
    assert again.request == start.request  # the same request has the same digest


async def test_feedback_without_text_keeps_its_kind() -> None:
    spool, inner, _ = bench()
    comment = await kept(spool, inner, make.feedback(make.new_id(), comment="bad", text=False))
    assert comment.comment == ""
    shown = await kept(spool, inner, make.feedback(make.new_id(), demonstration=said("so"), text=False))
    assert shown.demonstration == said("")
    score = await kept(spool, inner, make.feedback(make.new_id(), score=0.25, text=False))
    assert score.score == 0.25


async def test_a_refused_start_leaves_nothing_in_memory() -> None:
    spool, inner, _ = bench()
    inner.full = True
    with pytest.raises(SpoolFull):
        await spool.append(make.started(text=False))
    assert spool._without_text == set()


# Bounds


async def test_a_large_record_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = 0
    real = asyncio.to_thread

    async def counted(work: Any) -> Any:
        nonlocal threads
        threads += 1
        return await real(work)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    spool, inner, _ = bench("mask")
    for content in ("x" * 100_000 + " bob@example.com", [str(number) for number in range(3000)]):
        request = {"messages": [{"role": "user", "content": content}]}
        await spool.append(make.started(request=request))
    assert threads == 3
    assert "bob" not in str(inner.records[0])
    await spool.append(make.started())
    assert threads == 3


@pytest.mark.parametrize("request_", [{"messages": object()}, {"messages": [1]}, {"deep": None}])
async def test_a_record_that_json_cannot_hold_is_refused_in_words(request_: dict[str, Any]) -> None:
    spool, inner, _ = bench()
    if "deep" in request_:
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        request_ = {"deep": deep}
    with pytest.raises(ValueError, match="JSON"):
        await spool.append(make.started(request=request_))
    assert inner.records == []


async def test_it_is_a_spool_in_every_other_respect() -> None:
    spool, inner, _ = bench()
    await spool.append(ServerStarted("server-1", make.NOON))
    assert len(inner.records) == 1
    assert spool.state() == inner.state()
    await spool.close()
    assert inner.closed


ANY_RECORD = make.feedbacks | st.builds(
    lambda end, answer: replace(end, answer=message_to_plain(answer)), make.ends, make.messages
)


@given(record=ANY_RECORD)
def test_a_change_that_changes_nothing_gives_the_same_record(record: LogRecord) -> None:
    assert record_to_json(changed(record, lambda text: text)) == record_to_json(record)


@given(record=ANY_RECORD)
def test_without_text_every_record_can_be_stored(
    record: InferenceEnded | Feedback,
) -> None:
    bare = without_text(record, lambda _: "digest")
    assert record_from_json(record_to_json(bare)) == bare


# The key


def test_the_key_is_made_once_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "var" / "redaction.key"
    key = read_key(path)
    assert len(key) == 32
    assert read_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["redaction.key"]


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(Precondition, match="5 bytes"):
        read_key(tmp_path / "key")
