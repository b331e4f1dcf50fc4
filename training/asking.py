"""Asks questions through the server for evaluation, and keeps the answers.

Answers are kept in `<state>/cache/evaluation/<model sha256>.jsonl` by all that they depend on, so that a
champion is asked once, and an evaluation that was killed goes on where it stood.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agentloop.types as wire
from agentloop.client import AsyncClient
from agentloop.errors import InvalidArgument
from grpc_server.domain.chat_format import render
from grpc_server.domain.plain import message_to_plain, plain, request_to_plain
from grpc_server.domain.types import ChatRequest, Message, Role, ToolCall
from training.own_server import own_server
from training.subjects import Place, Subject
from training.suites import Config, Item
from training.watching import Progress

REFUSED = "refused"
"""The finish reason of what the server would not ask the model."""


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a suite, as one subject is asked it; `key` names the answer in the cache."""

    suite: str
    item: Item
    subject: Subject
    request: ChatRequest
    key: str


Answer = Mapping[str, Any]  # {"key", "finish_reason", "output_tokens", "latency_ms", "answer"}


def key(subject: Subject, request: ChatRequest, made_by: Mapping[str, str]) -> str:
    """SHA-256 of all that a greedy answer depends on; `made_by` is what `own_server.generator` says."""
    prompt = render(request.messages, request.tools, request.tool_choice, request.response_schema)
    depends = [subject.sha256, dict(made_by), prompt, request_to_plain(request)]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


async def ask_all(
    questions: Sequence[Question], config: Config, place: Place, progress: Progress
) -> dict[str, Answer]:
    """An answer for the key of each question; only what is not in the cache is asked."""
    caches = {
        sha256: Cache(place.state_dir / "cache" / "evaluation" / f"{sha256}.jsonl")
        for sha256 in {question.subject.sha256 for question in questions}
    }
    answers = {key: answer for cache in caches.values() for key, answer in cache.answers.items()}
    to_ask = {question.key: question for question in questions if question.key not in answers}
    total = len({question.key for question in questions})
    done = total - len(to_ask)
    progress(done, total)
    if not to_ask:
        return answers
    parent = place.state_dir / "evaluation"
    async with (
        own_server(parent, engine=place.engine, parallel=config.in_flight) as server,
        AsyncClient(server.address, server.token) as client,
    ):
        for sha256, cache in caches.items():
            here = [question for question in to_ask.values() if question.subject.sha256 == sha256]
            if not here:
                continue
            async with (
                _installed(client, here[0].subject) as model_version,
                aclosing(_ask_each(client, model_version, here, config)) as asked,
            ):
                async for answer in asked:
                    if answer["finish_reason"] != REFUSED:  # of another server, it need not be
                        cache.add(answer)
                    answers[answer["key"]] = answer
                    done += 1
                    progress(done, total)
    return answers


@asynccontextmanager
async def _installed(client: AsyncClient, subject: Subject) -> AsyncIterator[str]:
    """The subject's GGUF in the engine, under its name; removed when all went well: memory holds but one."""
    await client.install_model(subject.model_version, subject.gguf.resolve(), subject.sha256)
    yield subject.model_version
    await client.remove_model(subject.model_version)


async def _ask_each(
    client: AsyncClient, model_version: str, questions: Sequence[Question], config: Config
) -> AsyncGenerator[Answer, None]:
    """The answers, as they come; `in_flight` are asked at once."""
    places = asyncio.Semaphore(config.in_flight)

    async def ask(question: Question) -> Answer:
        async with places:
            return await _ask(client, model_version, question, config.deadline_seconds)

    tasks = [asyncio.ensure_future(ask(question)) for question in questions]
    try:
        for finished in asyncio.as_completed(tasks):
            yield await finished
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(client: AsyncClient, model_version: str, question: Question, deadline: float) -> Answer:
    request, sampling = question.request, question.request.sampling
    try:
        answer = await client.ask(
            [_to_wire(message) for message in request.messages],
            tools=[wire.Tool(tool.name, tool.description, tool.parameters) for tool in request.tools],
            tool_choice=request.tool_choice.value,
            sampling=wire.Sampling(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                stop=sampling.stop,
            ),
            json_schema=request.response_schema,
            model_version=model_version,
            timeout_s=deadline,
        )
    except InvalidArgument:  # no model can be asked this: too long for the context, or an odd schema
        nothing = message_to_plain(Message(Role.ASSISTANT))
        return {
            "key": question.key,
            "finish_reason": REFUSED,
            "output_tokens": 0,
            "latency_ms": 0.0,
            "answer": nothing,
        }
    calls = tuple(ToolCall(call.name, plain(call.arguments)) for call in answer.tool_calls)
    return {
        "key": question.key,
        "finish_reason": answer.completed.finish_reason,
        "output_tokens": answer.completed.output_tokens,
        "latency_ms": round(answer.completed.total_ms, 1),
        "answer": message_to_plain(Message(Role.ASSISTANT, "" if calls else answer.text, calls)),
    }


def _to_wire(message: Message) -> wire.Message:
    calls = tuple(wire.ToolCall(call.name, call.arguments) for call in message.tool_calls)
    return wire.Message(message.role.value, message.content, calls, message.tool_name)


class Cache:
    """The answers of one model, one a line, added as they come; a line that a kill cut off is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.answers: dict[str, Answer] = {}
        written = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in written.split("\n"):
            with suppress(ValueError):
                answer = json.loads(line)
                self.answers[answer["key"]] = answer
        if written and not written.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, answer: Answer) -> None:
        """Keep an answer."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(answer, ensure_ascii=False, sort_keys=True) + "\n")


def forget(state_dir: Path) -> None:
    """Delete every answer that is kept; what is asked again is answered again."""
    for path in (state_dir / "cache" / "evaluation").glob("*.jsonl"):
        path.unlink(missing_ok=True)
