"""LogService over the wire: a caller sees its own rows, an administrator all, and nobody learns of others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from agentloop import AsyncClient, Client, errors
from agentloop.types import Message, Sampling, Tool, ToolCall
from agentloop.v1 import log_pb2
from grpc_server.domain.plain import message_to_plain, request_to_plain
from grpc_server.domain.types import Caller, ChatRequest, GenerateRequest, Role, Scope, Status
from grpc_server.domain.types import Message as DomainMessage
from grpc_server.domain.types import Sampling as DomainSampling
from grpc_server.domain.types import Tool as DomainTool
from grpc_server.domain.types import ToolCall as DomainCall
from tests import records as make
from tests.fakes import FakeLogStore
from tests.integration.grpc_bench import Bench, bearer, status_of

ROTATED = Caller("k-rotated", "billing", frozenset({Scope.INFER}))
OTHER = Caller("k-other", "travel-desk", frozenset({Scope.INFER}))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench()
    made.authenticator.callers |= {"al_rotated": ROTATED, "al_other": OTHER}
    async with made.run(tmp_path) as running:
        yield running


def client(bench: Bench, token: str = "al_infer") -> AsyncClient:
    assert bench.running is not None
    return AsyncClient(bench.running.grpc_address, token)


async def stored(store: FakeLogStore, *records: Any) -> None:
    await store.store(records)


async def test_an_inference_is_shown_with_all_that_was_asked_answered_and_said(bench: Bench) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    call = DomainCall("weather", {"city": "Łódź\0"})
    asked = ChatRequest(
        (DomainMessage(Role.USER, "Weather?"), DomainMessage(Role.ASSISTANT, "", (call,))),
        tools=(DomainTool("weather", "The weather.", parameters),),
        sampling=DomainSampling(temperature=0.5, max_tokens=9, seed=3, stop=("x",)),
    )
    start = make.started(request=request_to_plain(asked), session_id="s")
    answer = message_to_plain(DomainMessage(Role.ASSISTANT, "", (call,)))
    right = make.feedback(start.id, demonstration=DomainMessage(Role.ASSISTANT, "It rains."))
    good = make.feedback(start.id, boolean=True, created_at=make.NOON + timedelta(seconds=9))
    score = make.feedback(start.id, score=0.5, created_at=make.NOON + timedelta(seconds=8))
    comment = make.feedback(start.id, comment="hm", created_at=make.NOON + timedelta(seconds=7))
    await stored(bench.store, start, make.ended(start.id, answer=answer), right, good, score, comment)
    async with client(bench) as caller:
        row = await caller.get_inference(str(start.id))
    assert (row.inference_id, row.caller, row.key_id) == (str(start.id), "billing", start.key_id)
    assert (row.status, row.finish_reason, row.target_role) == ("ok", "stop", "stable")
    assert (row.input_tokens, row.output_tokens, row.ttft_ms) == (3, 2, 12.25)
    assert (row.started_at, row.ended_at) == (start.started_at, start.started_at + timedelta(seconds=1))
    assert row.request is not None
    shown = ToolCall("weather", {"city": "Łódź\0"})
    assert row.request.messages == (Message("user", "Weather?"), Message("assistant", "", (shown,)))
    assert row.request.tools == (Tool("weather", "The weather.", parameters),)
    assert row.request.sampling == Sampling(0.5, row.request.sampling.top_p, 64, 9, 3, ("x",))
    assert row.request.sampling.top_p == pytest.approx(0.95)
    assert row.answer == Message("assistant", "", (shown,))
    assert [each.boolean for each in row.feedback] == [True, None, None, None]
    assert [each.score for each in row.feedback] == [None, 0.5, None, None]
    assert [each.comment for each in row.feedback] == [None, None, "hm", None]
    assert row.feedback[3].demonstration == Message("assistant", "It rains.")
    assert row.feedback_count == 4


async def test_a_raw_prompt_is_shown_as_one(bench: Bench) -> None:
    asked = GenerateRequest("Once", response_schema={"type": "object"})
    start = make.started(request=request_to_plain(asked))
    await stored(bench.store, start)
    async with client(bench) as caller:
        row = await caller.get_inference(str(start.id))
    assert row.request is not None
    assert (row.request.prompt, row.request.messages) == ("Once", ())
    assert row.request.json_schema == {"type": "object"}
    assert (row.status, row.ended_at, row.answer) == ("started", None, None)


@pytest.mark.parametrize(
    "request_",
    [{}, {"messages": 7}, {"messages": [{"role": "robot"}]}, {"messages": [], "withheld": {"characters": 3}}],
)
async def test_a_row_whose_text_was_not_kept_is_shown_without_it(bench: Bench, request_: Any) -> None:
    start = make.started(request=request_)
    for answer in ({"content": "", "role": "assistant", "withheld": {"characters": 3}}, {"content": 7}):
        bench.store.rows.clear()
        await stored(bench.store, start, make.ended(start.id, answer=answer))
        async with client(bench) as caller:
            row = await caller.get_inference(str(start.id))
        assert (row.request, row.answer, row.status) == (None, None, "ok")


async def test_half_a_surrogate_pair_is_shown_as_something_else(bench: Bench) -> None:
    asked = ChatRequest((DomainMessage(Role.USER, "a\ud800"),))
    start = make.started(request=request_to_plain(asked))
    await stored(bench.store, start, make.feedback(start.id, comment="\udfff"))
    async with client(bench) as caller:
        row = await caller.get_inference(str(start.id))
    assert row.request is not None
    assert (row.request.messages[0].content, row.feedback[0].comment) == ("a?", "?")


async def test_own_is_what_was_asked_under_ones_name_whatever_the_token(bench: Bench) -> None:
    mine, theirs = make.started(caller="billing", key_id="gone"), make.started(caller="travel-desk")
    await stored(bench.store, mine, theirs)
    for token, seen in (
        ("al_infer", {mine.id}),
        ("al_rotated", {mine.id}),
        ("al_other", {theirs.id}),
        ("al_admin", {mine.id, theirs.id}),
    ):
        async with client(bench, token) as caller:
            listed = {row.inference_id async for row in caller.inferences()}
            assert listed == {str(each) for each in seen}
            for each in (mine.id, theirs.id):
                if each in seen:
                    assert (await caller.get_inference(str(each))).inference_id == str(each)
                else:
                    with pytest.raises(errors.NotFound):
                        await caller.get_inference(str(each))


async def test_another_callers_inference_and_none_are_refused_in_the_same_words(bench: Bench) -> None:
    theirs = make.started(caller="travel-desk")
    await stored(bench.store, theirs)
    async with client(bench) as caller:
        texts = set()
        for wanted in (str(theirs.id), str(make.new_id())):
            with pytest.raises(errors.NotFound) as refused:
                await caller.get_inference(wanted)
            texts.add(refused.value.details.replace(wanted, "…"))
    assert len(texts) == 1


async def test_only_administrators_may_ask_for_another_caller(bench: Bench) -> None:
    await stored(bench.store, make.started(caller="billing"), make.started(caller="travel-desk"))
    async with client(bench) as caller:
        assert len((await caller.list_inferences(caller="billing")).inferences) == 1
        with pytest.raises(errors.PermissionDenied):
            await caller.list_inferences(caller="travel-desk")
    async with client(bench, "al_admin") as admin:
        page = await admin.list_inferences(caller="travel-desk")
        assert [row.caller for row in page.inferences] == ["travel-desk"]


async def test_a_list_has_no_texts_and_goes_on_page_by_page(bench: Bench) -> None:
    rows = [make.started() for _ in range(5)]
    await stored(bench.store, *rows, make.ended(rows[0].id), make.feedback(rows[0].id, boolean=True))
    async with client(bench) as caller:
        first = await caller.list_inferences(page_size=3)
        second = await caller.list_inferences(page_size=3, page_token=first.next_page_token)
    shown = (*first.inferences, *second.inferences)
    assert [row.inference_id for row in shown] == [str(row.id) for row in reversed(rows)]
    assert second.next_page_token == ""
    assert all(row.request is None and row.answer is None and row.feedback == () for row in shown)
    assert shown[-1].feedback_count == 1


async def test_a_page_holds_fifty_and_never_more_than_two_hundred(bench: Bench) -> None:
    await stored(bench.store, *(make.started() for _ in range(210)))
    async with client(bench) as caller:
        for wanted, got in ((0, 50), (200, 200), (2**32 - 1, 200)):
            assert len((await caller.list_inferences(page_size=wanted)).inferences) == got


async def test_a_page_token_is_bound_to_its_filter_and_its_caller(bench: Bench) -> None:
    await stored(bench.store, *(make.started() for _ in range(3)))
    moment = datetime.now(UTC)
    async with client(bench) as caller, client(bench, "al_admin") as admin:
        token = (await caller.list_inferences(page_size=1)).next_page_token
        filters: list[dict[str, Any]] = [
            {"session_id": "s"},
            {"model_version": "m:1"},
            {"status": "ok"},
            {"since": moment},
            {"until": moment},
        ]
        for other in filters:
            with pytest.raises(errors.InvalidArgument, match="another filter or caller") as refused:
                await caller.list_inferences(page_token=token, **other)
            assert refused.value.field_violations[0].field == "page_token"
        with pytest.raises(errors.InvalidArgument):
            await admin.list_inferences(page_token=token, caller="billing")
        assert (await caller.list_inferences(page_size=2, page_token=token)).inferences


@pytest.mark.parametrize("token", ["x", "=", "é", "A" * 38, "A" * 65, "a" * 100_000, "A" * 37 + "!"])
async def test_a_token_that_is_none_is_refused(bench: Bench, token: str) -> None:
    async with client(bench) as caller:
        with pytest.raises(errors.InvalidArgument) as refused:
            await caller.list_inferences(page_token=token)
    assert refused.value.field_violations[0].field == "page_token"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"since": Timestamp(seconds=-1)}, "since"),
        ({"until": Timestamp(seconds=2**62)}, "until"),
        ({"since": Timestamp(nanos=-5)}, "since"),
        ({"session_id": "s" * 129}, "session_id"),
        ({"session_id": "\0"}, "session_id"),
        ({"model_version": "m"}, "model_version"),
        ({"caller": "c" * 129}, "caller"),
        ({"status": 99}, "status"),
    ],
)
async def test_a_filter_that_is_wrong_is_refused(bench: Bench, fields: dict[str, Any], field: str) -> None:
    request = log_pb2.ListInferencesRequest(**fields)
    error = await status_of(bench.log_stub.ListInferences(request, metadata=bearer("al_admin")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert errors.from_grpc(error).field_violations[0].field == field


async def test_a_log_that_is_away_is_unavailable_while_answers_go_on(bench: Bench) -> None:
    bench.store.down = True
    async with client(bench) as caller:
        assert (await caller.ask("Hi")).text == "Hello, world!"
        with pytest.raises(errors.Unavailable) as away:
            await caller.list_inferences(timeout_s=0.5)
    assert away.value.reason == "STORE_UNAVAILABLE"


async def test_the_plain_client_reads_the_same(bench: Bench) -> None:
    rows = [make.started(session_id="s") for _ in range(3)]
    await stored(bench.store, *rows, make.ended(rows[0].id, status=Status.ERROR))

    def read() -> tuple[list[str], str, list[str]]:
        assert bench.running is not None
        with Client(bench.running.grpc_address, "al_infer") as plain:
            every = [row.inference_id for row in plain.inferences(page_size=2)]
            one = plain.get_inference(every[0]).inference_id
            failed = plain.list_inferences(
                status="error", session_id="s", since=datetime(2020, 1, 1, tzinfo=UTC)
            )
            with pytest.raises(errors.ConfigurationError, match="time zone"):
                plain.list_inferences(since=datetime(2020, 1, 1))
            with pytest.raises(errors.ConfigurationError, match="status is"):
                plain.list_inferences(status="odd")  # type: ignore[arg-type]
            return every, one, [row.inference_id for row in failed.inferences]

    every, one, failed = await asyncio.to_thread(read)
    assert every == [str(row.id) for row in reversed(rows)]
    assert (one, failed) == (every[0], [str(rows[0].id)])


# The command line


async def run(bench: Bench, *arguments: str, token: str = "al_infer", stdin: str | None = None) -> Any:
    from typer.testing import CliRunner

    from agentloop.cli import app

    assert bench.running is not None
    options = ["--server", bench.running.grpc_address, "--token", token]
    return await asyncio.to_thread(CliRunner().invoke, app, [*options, *arguments], input=stdin)


async def test_logs_lists_the_newest_first_and_show_shows_one(bench: Bench) -> None:
    rows = [make.started(request=request_to_plain(GenerateRequest("Once"))) for _ in range(3)]
    await stored(bench.store, *rows, *(make.ended(row.id, error="bad\x1b[2J") for row in rows))
    listed = await run(bench, "logs", "--limit", "2", "--since", "9000d", "--status", "ok")
    assert [line.split()[2] for line in listed.stdout.splitlines()] == [str(row.id) for row in rows[:0:-1]]
    as_json = await run(bench, "logs", "--json", "--limit", "0")
    lines = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [line["inference_id"] for line in lines] == [str(row.id) for row in reversed(rows)]
    assert "answer" not in lines[0]
    shown = await run(bench, "show", str(rows[0].id))
    assert f"inference_id: {rows[0].id}" in shown.stdout
    assert '"prompt": "Once"' in shown.stdout
    whole = json.loads((await run(bench, "show", str(rows[0].id), "--json")).stdout)
    assert whole["request"]["prompt"] == "Once"
    assert whole["answer"]["content"] == "hello"
    assert (await run(bench, "show", str(make.new_id()))).exit_code == 4
    assert (await run(bench, "logs", "--since", "yesterday")).exit_code == 2
    assert (await run(bench, "logs", "--status", "odd")).exit_code == 2


async def test_following_shows_each_inference_once_when_it_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make.started(started_at=datetime.now(UTC)) for _ in range(4)]
    await stored(bench.store, rows[0], rows[1], make.ended(rows[1].id))
    steps: list[list[Any]] = [
        [rows[2], make.ended(rows[2].id)],
        [make.ended(rows[0].id), rows[3]],
        [make.ended(rows[3].id)],
    ]

    def step(seconds: float) -> None:
        del seconds
        if not steps:
            raise KeyboardInterrupt
        for record in steps.pop(0):
            bench.store.rows[(type(record).__name__, record.id)] = record

    monkeypatch.setattr("agentloop.cli_log.time.sleep", step)
    followed = await run(bench, "logs", "--follow", "--json")
    seen = [json.loads(line)["inference_id"] for line in followed.stdout.splitlines()]
    assert seen == [str(rows[n].id) for n in (1, 2, 0, 3)]


async def test_the_other_calls_have_commands(bench: Bench, tmp_path: Path) -> None:
    assert (await run(bench, "generate", "Once", "--max-tokens", "2")).stdout == "Hello, \n"
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    held = await run(bench, "generate", "-", "--schema", str(schema), "--json", stdin="Once")
    assert json.loads(held.stdout.splitlines()[-1])["event"] == "completed"
    assert (await run(bench, "count-tokens", "--raw", "one two three")).stdout == "3\n"
    counted = await run(bench, "count-tokens", "one", "--system", "be brief", "--json")
    assert json.loads(counted.stdout)["input_tokens"] > 3
    made = json.loads((await run(bench, "embed", stdin="a\n\nb\n")).stdout)
    assert [len(vector) for vector in made["vectors"]] == [8, 8]
    refused = await run(bench, "cancel", str(make.new_id()), "--json")
    assert refused.exit_code == 4
    assert json.loads(refused.stderr)["error"]["reason"] == "NOT_FOUND"
    wrong = await run(bench, "embed", token="al_read", stdin="a")
    assert json.loads(wrong.stderr)["error"]["status"] == "PERMISSION_DENIED"
    odd = await run(bench, "generate", "x", "--top-p", "3", "--json")
    assert json.loads(odd.stderr)["error"]["field_violations"][0]["field"] == "sampling.top_p"
