"""Both clients against a server on the real gRPC, with the same promises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
import pytest

from agentloop import AsyncClient, Client, errors
from agentloop.types import (
    Completed,
    InstallProgress,
    Message,
    ModelDetails,
    ModelVersion,
    Route,
    Started,
    Target,
    TextDelta,
    ToolCall,
)
from agentloop.v1 import model_pb2
from tests.integration.conftest_client import ScriptedService, completed, running, started, text, tool_call

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with running(ScriptedService()) as made:
        yield made


class Both:
    """`Client` behind the face of `AsyncClient`, so that each test runs on both."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name == "chat":

            async def events(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
                stream = method(*arguments, **options)
                try:
                    while (event := await asyncio.to_thread(next, stream, None)) is not None:
                        yield event
                finally:
                    stream.close()

            return events

        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(method, *arguments, **options)

        return call


@pytest.fixture(params=["async", "sync"])
async def client(request: pytest.FixtureRequest, service: ScriptedService) -> AsyncIterator[Any]:
    if request.param == "async":
        async with AsyncClient(service.address, "al_x") as made:
            yield made
    else:
        with Client(service.address, "al_x") as plain:
            yield Both(plain)


async def test_an_answer_streams_event_by_event(service: ScriptedService, client: Any) -> None:
    service.chats = [[started(), text("He"), text("llo"), tool_call("f", '{"a": 1}'), completed()]]
    assert [event async for event in client.chat("hi")] == [
        Started("i-1", "m:1"),
        TextDelta("He"),
        TextDelta("llo"),
        ToolCall("f", {"a": 1}),
        Completed("stop", 3, 2, 1, 20, 30),
    ]
    assert service.tokens == ["Bearer al_x"]


async def test_the_first_piece_arrives_before_the_answer_is_complete(
    service: ScriptedService, client: Any
) -> None:
    rest = threading.Event()
    service.chats = [[started(), text("first"), rest, completed()]]
    async with aclosing(client.chat("hi")) as events:
        async for event in events:
            if event == TextDelta("first"):
                assert not rest.is_set()
                rest.set()
            last = event
    assert isinstance(last, Completed)


async def test_a_whole_answer_can_be_asked_for(service: ScriptedService, client: Any) -> None:
    service.chats = [[started(), text("yes"), completed()]]
    answer = await client.ask([Message("user", "hi")])
    assert (answer.text, answer.inference_id) == ("yes", "i-1")


async def test_every_call_has_a_deadline(service: ScriptedService, client: Any) -> None:
    service.chats = [[started(), completed()]]
    service.routes["default"] = model_pb2.Route(alias="default")
    await client.ask("hi")
    await client.submit_feedback("i", boolean=True)
    await client.list_models()
    await client.get_route()
    await client.health()
    assert all(0 < seconds < 301 for seconds in service.deadlines), service.deadlines


async def test_a_chat_that_found_no_server_is_tried_again(service: ScriptedService, client: Any) -> None:
    service.chats = [[UNAVAILABLE], [UNAVAILABLE], [started(), completed()]]
    assert (await client.ask("hi")).inference_id == "i-1"
    assert len(service.asked) == 3


async def test_a_chat_that_has_begun_is_never_asked_twice(service: ScriptedService, client: Any) -> None:
    service.chats = [[started("i-7"), text("ha"), UNAVAILABLE], [started(), completed()]]
    with pytest.raises(errors.Unavailable) as caught:
        await client.ask("hi")
    assert caught.value.inference_id == "i-7"
    assert len(service.asked) == 1


async def test_a_refused_chat_is_not_tried_again(service: ScriptedService, client: Any) -> None:
    service.chats = [[grpc.StatusCode.INVALID_ARGUMENT]]
    with pytest.raises(errors.InvalidArgument, match="as scripted"):
        await client.ask("hi")


async def test_a_server_that_stays_away_is_reported_in_the_end(service: ScriptedService, client: Any) -> None:
    service.chats = [[UNAVAILABLE]] * 5
    with pytest.raises(errors.Unavailable):
        await client.ask("hi")
    assert len(service.asked) == 5


async def test_a_stream_without_its_last_event_is_an_error(service: ScriptedService, client: Any) -> None:
    service.chats = [[started(), text("half")]]
    with pytest.raises(errors.IncompleteStream, match="i-1"):
        await client.ask("hi")


async def test_a_deadline_that_passes_says_which_inference_it_was(
    service: ScriptedService, client: Any
) -> None:
    never = threading.Event()
    service.chats = [[started(), never]]
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await client.ask("hi", timeout_s=2)
    never.set()
    assert caught.value.inference_id == "i-1"


async def test_closing_the_stream_cancels_the_call(service: ScriptedService, client: Any) -> None:
    never = threading.Event()
    service.chats = [[started(), never, completed()]]
    async with aclosing(client.chat("hi")) as events:
        async for _ in events:
            break
    cancelled = await asyncio.to_thread(service.cancelled.wait, 5)
    never.set()
    assert cancelled


async def test_feedback_that_found_no_server_is_sent_again_with_the_same_id(
    service: ScriptedService, client: Any
) -> None:
    service.refusals = [UNAVAILABLE]
    feedback_id = await client.submit_feedback("i-1", demonstration=Message("assistant", "right"))
    first, second = service.asked
    assert first == second
    assert second.feedback_id == feedback_id  # type: ignore[attr-defined]


async def test_models_are_installed_listed_and_removed(service: ScriptedService, client: Any) -> None:
    model, changed = await client.install_model("m:2", "/models/m.gguf", "ab")
    assert (model, changed) == (ModelVersion("m:2", "ab", 253_000_000, False), True)
    assert await client.install_model("m:2", "/models/m.gguf", "ab") == (model, False)
    assert await client.list_models() == [model]
    assert await client.remove_model("m:2")
    assert not await client.remove_model("m:2")


async def test_an_installation_tells_how_far_it_is(service: ScriptedService, client: Any) -> None:
    seen: list[InstallProgress] = []
    model, changed = await client.install_model("m:2", "/models/m.gguf", "ab", on_progress=seen.append)
    assert (model.name, changed) == ("m:2", True)
    assert seen == [InstallProgress("copying", 50, 100, 2, 3)]
    service.breaks_off = True
    with pytest.raises(errors.IncompleteStream):
        await client.install_model("m:2", "/models/m.gguf", "ab", on_progress=seen.append)


async def test_an_installation_that_finds_no_server_is_tried_again(
    service: ScriptedService, client: Any
) -> None:
    service.refusals = [UNAVAILABLE]
    seen: list[InstallProgress] = []
    await client.install_model("m:2", "/models/m.gguf", "ab", on_progress=seen.append)
    assert len(service.asked) == 2


async def test_a_version_is_shown_loaded_and_unloaded(service: ScriptedService, client: Any) -> None:
    model, _ = await client.install_model("m:2", "/models/m.gguf", "ab")
    loaded = replace(model, loaded=True)
    assert await client.load_model("m:2") == (loaded, True)
    assert await client.load_model("m:2") == (loaded, False)
    details = await client.get_model("m:2")
    assert details == ModelDetails(
        loaded, "gemma3", 268_098_176, "Q4_K_M", 32_768, "1", "m:base", ("default",)
    )
    with pytest.raises(errors.RpcError, match="leads to it"):
        await client.unload_model("m:2")
    assert await client.unload_model("m:2", force=True) == (model, True)
    with pytest.raises(errors.NotFound):
        await client.get_model("m:3")


async def test_a_route_is_replaced_only_at_its_revision(service: ScriptedService, client: Any) -> None:
    targets = (Target("m:1", "stable", 90), Target("m:2", "canary", 10))
    assert await client.set_route("default", targets, 0) == Route("default", 1, targets)
    assert await client.get_route() == Route("default", 1, targets)
    with pytest.raises(errors.Conflict):
        await client.set_route("default", targets, 0)


async def test_a_change_that_may_have_happened_is_not_sent_twice(
    service: ScriptedService, client: Any
) -> None:
    service.refusals = [UNAVAILABLE]
    with pytest.raises(errors.Unavailable):
        await client.set_route("default", (Target("m:1", "stable", 100),), 0)
    service.refusals = [UNAVAILABLE]
    with pytest.raises(errors.Unavailable):
        await client.remove_model("m:1")
    assert len(service.asked) == 2


async def test_health_is_told_by_its_name(service: ScriptedService, client: Any) -> None:
    assert await client.health() == "SERVING"
    service.serving = False
    assert await client.health() == "NOT_SERVING"


@pytest.mark.parametrize("kind", [AsyncClient, Client])
async def test_an_address_with_tls_does_not_speak_plaintext(kind: type, service: ScriptedService) -> None:
    made = kind(f"grpcs://{service.address}", "al_secret")
    try:
        with pytest.raises(errors.Unavailable):
            found = made.health(timeout_s=1)
            if asyncio.iscoroutine(found):
                await found
    finally:
        closing = made.close()
        if asyncio.iscoroutine(closing):
            await closing
    assert service.asked == []
