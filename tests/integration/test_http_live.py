"""OpenAI's client and a WebSocket against `python -m grpc_server serve`: embedded engine, Postgres."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import openai
import psycopg
import pytest
from websockets.sync.client import connect

from grpc_server.adapters.local_postgres import LocalPostgres
from tests.live_server import LiveServer

HELLO: Any = [{"role": "user", "content": "Name a colour."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Bodø"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def token(live_server: LiveServer) -> str:
    return live_server.token("infer", name="http")


@pytest.fixture
def client(live_server: LiveServer, token: str) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"http://{live_server.http_address}/v1", api_key=token, http_client=http)


def status(server: LiveServer, inference_id: str) -> str:
    """That of the row, once it has ended."""
    until = time.monotonic() + 30
    with (
        LocalPostgres(server.state_dir / "postgres") as postgres,
        psycopg.connect(postgres.dsn()) as database,
    ):
        database.autocommit = True
        while time.monotonic() < until:
            row = database.execute("SELECT status FROM inference WHERE id = %s", (inference_id,)).fetchone()
            if row is not None and row[0] != "started":
                return str(row[0])
            time.sleep(0.05)
    raise AssertionError(f"the log has no end of {inference_id}")


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


def test_the_real_model_answers_openais_client_and_the_log_has_the_rows(
    live_server: LiveServer, client: openai.OpenAI
) -> None:
    create = client.chat.completions.create
    whole = create(model="default", messages=HELLO, max_tokens=4, temperature=0)
    chunks = list(
        create(
            model="default",
            messages=HELLO,
            max_tokens=4,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert (whole.choices[0].message.content, whole.usage) == (streamed, chunks[-1].usage)
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    assert {status(live_server, each) for each in (whole.id, chunks[0].id)} == {"ok"}
    assert "default" in [model.id for model in client.models.list()]


def test_the_real_model_is_held_to_a_tool_and_to_a_schema(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    options: Any = {"model": "default", "messages": HELLO, "max_tokens": 64, "temperature": 0}
    message = create(**options, tools=[WEATHER], tool_choice="required").choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Bodø")
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    answer = create(**options, response_format=form).choices[0].message.content
    assert json.loads(answer)["colour"] in ("red", "blue")


def test_the_real_engine_makes_a_vector_of_each_text(client: openai.OpenAI) -> None:
    texts = ["A red rose.", "A crimson rose.", "Invoice number 7."]
    made = client.embeddings.create(model="default", input=texts)
    rose, other, invoice = (each.embedding for each in made.data)
    assert made.usage.prompt_tokens > len(texts)
    assert cosine(rose, other) > cosine(rose, invoice)


def test_leaving_in_the_middle_stops_the_real_engine(live_server: LiveServer, client: openai.OpenAI) -> None:
    story: Any = [{"role": "user", "content": "Count to a million."}]
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "array", "items": {"const": 1}, "minItems": 900}},
    }
    with client.chat.completions.create(
        model="default", messages=story, response_format=form, max_tokens=900, stream=True
    ) as stream:
        first = next(iter(stream))
    assert status(live_server, first.id) == "cancelled"


def test_a_browser_asks_the_real_model_over_a_websocket(live_server: LiveServer, token: str) -> None:
    with connect(f"ws://{live_server.http_address}/v1/chat/ws", proxy=None) as socket:
        socket.send(json.dumps({"authorization": f"Bearer {token}"}))
        socket.send(json.dumps({"model": "default", "messages": HELLO, "max_tokens": 4, "temperature": 0}))
        events = [json.loads(message) for message in socket]
    assert [events[0]["type"], events[-1]["type"]] == ["started", "completed"]
    assert status(live_server, events[0]["inference_id"]) == "ok"
