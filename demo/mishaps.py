"""What goes wrong in life, played on purpose: each with the statuses that a right server answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from agentloop.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc

TIMEOUT_S = 10.0
TOO_LARGE = 2 * 1024 * 1024  # over the 1 MiB that a request may have
UNKNOWN_TOKEN = "al_000000000000_" + "A" * 43


@dataclass(frozen=True, slots=True)
class Malformed:
    """A request that must be refused. `token`: None is the service's own, "" is none."""

    name: str
    refusals: frozenset[str]
    request: inference_pb2.ChatRequest | model_pb2.ListModelsRequest
    token: str | None = None


def _question(content: str = "What is the weather in Oslo?") -> inference_pb2.Message:
    return inference_pb2.Message(role=inference_pb2.ROLE_USER, content=content)


def _chat(**fields: object) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(**({"messages": [_question()]} | fields))  # type: ignore[arg-type]


MALFORMED: tuple[Malformed, ...] = (
    Malformed(
        "a role that does not exist",
        frozenset({"INVALID_ARGUMENT"}),
        _chat(messages=[inference_pb2.Message(role=99, content="?")]),  # type: ignore[arg-type]
    ),
    Malformed("no message", frozenset({"INVALID_ARGUMENT"}), _chat(messages=[])),
    Malformed(
        "a tool whose schema is not JSON",
        frozenset({"INVALID_ARGUMENT"}),
        _chat(tools=[inference_pb2.ToolDefinition(name="weather", parameters_json_schema="{")]),
    ),
    Malformed(
        "a temperature of 9",
        frozenset({"INVALID_ARGUMENT"}),
        _chat(sampling=inference_pb2.SamplingOptions(temperature=9)),
    ),
    Malformed(
        "two mebibytes of text",
        frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}),
        _chat(messages=[_question("x" * TOO_LARGE)]),
    ),
    Malformed("an alias that does not exist", frozenset({"NOT_FOUND"}), _chat(alias="no-such-alias")),
    Malformed("a token that nobody was given", frozenset({"UNAUTHENTICATED"}), _chat(), UNKNOWN_TOKEN),
    Malformed("no token", frozenset({"UNAUTHENTICATED"}), _chat(), ""),
    Malformed(
        "a list of models without the scope", frozenset({"PERMISSION_DENIED"}), model_pb2.ListModelsRequest()
    ),
)


def in_turn() -> Iterator[Malformed]:
    """Each of them, again and again."""
    return itertools.cycle(MALFORMED)


async def send(malformed: Malformed, channel: grpc.aio.Channel, token: str) -> str:
    """The name of the status that it gets; `token` is the service's own."""
    shown = token if malformed.token is None else malformed.token
    metadata = (("authorization", f"Bearer {shown}"),) if shown else ()
    try:
        if isinstance(malformed.request, model_pb2.ListModelsRequest):
            models = model_pb2_grpc.ModelServiceStub(channel)
            await models.ListModels(malformed.request, timeout=TIMEOUT_S, metadata=metadata)
        else:
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            async for _ in inference.Chat(malformed.request, timeout=TIMEOUT_S, metadata=metadata):
                pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"
