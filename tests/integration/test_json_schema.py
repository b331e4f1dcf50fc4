"""Callers' schemas are checked elsewhere: whatever they hold, the server goes on, and checks the next."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from grpc_server.adapters.json_schema import Schemas
from grpc_server.adapters.json_schema_process import SchemaProcess
from grpc_server.domain.errors import EngineFailed, EngineUnavailable, InvalidArgument
from tests.integration.conftest_engine import processes_below

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHILD = "json_schema_child"
FEW = 3
"""A loop that is held up all the while ticks once or twice; a free one a hundred times on an idle machine."""
SIMPLE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

# Each takes hours, at least.
DOUBLED = {
    "allOf": [
        {"anyOf": [{"type": "string", "pattern": f"^a{{{n}}}b"}, {"type": "string", "pattern": f"^b{{{n}}}"}]}
        for n in range(40)
    ]
}
BACKTRACKING = {"anyOf": [{"type": "string", "pattern": "^(a+)+b$"}, {"const": "a" * 40}]}
REFERRED = {
    "anyOf": [{"$ref": "#/$defs/a0"}, {"const": "a" * 40}],
    "$defs": {
        "a40": {"const": 1},
        **{f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)},
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def schemas() -> AsyncIterator[Schemas]:
    made = Schemas(SchemaProcess(cpu_seconds=1.0))
    yield made
    await made.close()


@asynccontextmanager
async def attentive() -> AsyncIterator[list[float]]:
    """Collects how late the loop was, while the block runs."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - before - 0.01)

    ticking = asyncio.create_task(tick())
    try:
        yield late
    finally:
        ticking.cancel()


def children() -> set[int]:
    return {process.pid for process in processes_below(os.getpid(), CHILD)}


async def test_a_schema_that_takes_ages_to_compile_is_refused_and_holds_nobody_up(schemas: Schemas) -> None:
    await schemas.checked(SIMPLE)
    async with attentive() as late:
        with pytest.raises(InvalidArgument, match="too complex"):
            await asyncio.wait_for(schemas.checked(DOUBLED), 30)
    assert len(late) > FEW
    assert statistics.median(late) < 0.25  # it was there all the while, as far as a busy machine lets it
    assert await schemas.checked(SIMPLE) == SIMPLE


@pytest.mark.parametrize("schema", [BACKTRACKING, REFERRED], ids=["backtracking", "referred"])
async def test_an_answer_that_takes_ages_to_check_is_given_up_and_holds_nobody_up(
    schemas: Schemas, schema: dict[str, Any]
) -> None:
    assert await schemas.checked(schema) == schema
    async with attentive() as late:
        with pytest.raises(EngineFailed, match="too complex"):
            await asyncio.wait_for(schemas.check_answer('"' + "a" * 40 + '"', schema), 30)
    assert len(late) > FEW
    assert statistics.median(late) < 0.25
    await schemas.check_answer('{"city": "Oslo"}', SIMPLE)


async def test_a_pattern_still_holds_an_answer(schemas: Schemas) -> None:
    schema = {"type": "string", "pattern": "^[a-z]+$"}
    await schemas.check_answer('"oslo"', schema)
    for wrong in ('"Oslo"', "oslo", '"oslo', "1" * 5000, "[" * 100_000):
        with pytest.raises(EngineFailed, match="did not hold"):
            await schemas.check_answer(wrong, schema)


async def test_the_time_is_for_one_question_and_not_for_all(schemas: Schemas) -> None:
    await schemas.checked(SIMPLE)
    before = children()
    for _ in range(100):
        await schemas.check_answer("[" + "1," * 1000 + "1]", {"items": {"minimum": 0}})
    assert children() == before


async def test_one_who_goes_away_in_the_middle_of_a_question_leaves_no_answer_to_the_next(
    schemas: Schemas,
) -> None:
    await schemas.checked(SIMPLE)
    asking = asyncio.create_task(schemas.checked(DOUBLED))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await schemas.checked(SIMPLE) == SIMPLE


async def test_all_who_ask_at_once_get_their_own_answers(schemas: Schemas) -> None:
    asked = [schemas.checked({"const": number} if number % 2 else {"type": "no"}) for number in range(20)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert answers[1::2] == [{"const": number} for number in range(1, 20, 2)]
    assert {type(answer) for answer in answers[::2]} == {InvalidArgument}


async def test_nothing_runs_until_it_is_asked_nor_when_it_is_closed() -> None:
    before = children()
    made = Schemas(SchemaProcess())
    assert children() == before
    await made.checked(SIMPLE)
    assert len(children() - before) == 1
    await made.close()
    assert children() == before
    with pytest.raises(EngineUnavailable, match="closed"):
        await made.checked(SIMPLE)


async def test_where_no_process_can_be_started_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Schemas(SchemaProcess())
    for program in ("/nowhere", "/bin/false"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(EngineUnavailable, match="try again"):
            await made.checked(SIMPLE)
    await made.close()


async def test_it_ends_with_its_parent() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"grpc_server.adapters.{CHILD}", "1"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, said) == (0, b"ready\n")
