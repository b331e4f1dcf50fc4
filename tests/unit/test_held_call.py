"""A tool call that has begun is held to its tools' schema; nothing else is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import pytest

from grpc_server.domain import chat_format
from grpc_server.domain.errors import EngineUnavailable, InvalidArgument
from grpc_server.domain.held_call import CALL, held
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.types import Message, Role, Sampling, Tool, ToolCall, ToolChoice
from tests.fakes import BASE, FakeEngine
from tests.unit.test_inference import Bench, ask

SCHEMA = {"type": "object"}
ASKED = Generation(BASE, "Weather in Oslo?", Sampling(), call_schema=SCHEMA)
WEATHER = Tool(
    "weather",
    "The weather.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
INVENTED = ['{"na', 'me": "wea', 'ther", "arguments": {"town": ', '"Oslo"}}']
RIGHT = ['{"name": "weather", ', '"arguments": {"city": "Oslo"}}']


def engine(plainly: Sequence[str], held_to: Sequence[str] = RIGHT) -> FakeEngine:
    """Says one thing by itself, and another when it is held to a schema."""
    return FakeEngine(reply=lambda generation: held_to if generation.json_schema else plainly)


async def answer(asked: FakeEngine) -> list[Piece | Finished]:
    return [event async for event in held(asked, ASKED)]


def test_a_call_begins_as_the_model_was_taught_to_begin_one() -> None:
    taught = Message(Role.ASSISTANT, tool_calls=(ToolCall("weather", {"city": "Oslo"}),))
    assert chat_format.render_answer(taught).startswith(CALL)


async def test_an_answer_that_begins_as_a_call_is_asked_for_again_held_to_the_schema() -> None:
    asked = engine(INVENTED)
    *pieces, last = await answer(asked)
    assert [piece.text for piece in pieces if isinstance(piece, Piece)] == RIGHT
    assert isinstance(last, Finished) and last.usage.output_tokens == len(RIGHT)
    assert [generation.json_schema for generation in asked.asked] == [None, SCHEMA]
    assert all(generation.call_schema is None for generation in asked.asked)
    assert asked.running == 0
    assert [generation.json_schema for generation in asked.stopped] == [None]


@pytest.mark.parametrize(
    "said",
    [
        ["It is ", "cold."],
        ['{"city": ', '"Oslo"}'],  # JSON, and no call
        ["{"],  # ends before it is one
        [" ", "\n", '{"na', 'mes": []}'],
        [],
    ],
)
async def test_any_other_answer_is_as_the_engine_gave_it(said: list[str]) -> None:
    asked = engine(said)
    *pieces, last = await answer(asked)
    assert [piece.text for piece in pieces if isinstance(piece, Piece)] == said
    assert isinstance(last, Finished)
    assert len(asked.asked) == 1 and asked.running == 0


async def test_a_schema_that_nothing_can_be_held_to_holds_nothing() -> None:
    class Picky(FakeEngine):
        async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
            if generation.json_schema is not None:
                raise InvalidArgument("answers cannot be held to this JSON Schema: too complex")
            async for event in super().generate(generation):
                yield event

    *pieces, _ = await answer(Picky(reply=INVENTED))
    assert [piece.text for piece in pieces if isinstance(piece, Piece)] == INVENTED


async def test_a_caller_who_goes_away_stops_the_engine_whichever_stream_runs() -> None:
    for said in (["It is ", "cold."], INVENTED):
        asked = engine(said)
        events = held(asked, ASKED)
        await anext(events)
        await events.aclose()
        assert asked.running == 0


async def test_an_engine_that_breaks_off_before_it_is_clear_what_it_says_has_broken_off() -> None:
    class Broken(FakeEngine):
        async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
            yield Piece("{")

    bench = Bench(Broken())
    with pytest.raises(EngineUnavailable):
        await bench.chat(ask(tools=[WEATHER]))


# In the pipeline.


async def test_where_tools_are_offered_a_call_is_one_that_its_function_takes() -> None:
    bench = Bench(engine(INVENTED))
    await bench.chat(ask(tools=[WEATHER]))
    assert ToolCall("weather", {"city": "Oslo"}) in bench.seen.events
    assert bench.engine.asked[1].json_schema == chat_format.tool_call_schema([WEATHER])


@pytest.mark.parametrize("choice", [ToolChoice.NONE, ToolChoice.REQUIRED])
async def test_where_nothing_is_to_be_chosen_the_engine_is_asked_once(choice: ToolChoice) -> None:
    bench = Bench(engine(INVENTED))
    await bench.chat(ask(tools=[WEATHER], choice=choice))
    assert len(bench.engine.asked) == 1


async def test_a_tool_whose_schema_is_an_odd_one_is_offered_all_the_same() -> None:
    odd = {"type": "object", "properties": {"city": {"enum": "Oslo", "type": 7}}, "required": [{}, "city", 1]}
    bench = Bench(engine(["It is cold."]))
    await bench.chat(ask(tools=[Tool("weather", "", odd)]))
    assert bench.seen.text == "It is cold."
