"""What is asked, by whom, and when."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import grpc.aio

from agentloop import AsyncClient
from agentloop.connection import connection
from agentloop.errors import AgentLoopError, DeadlineExceeded, ResourceExhausted, RpcError
from agentloop.types import ChatEvent, Message, Sampling, Started, TextDelta, Tool, ToolCall
from demo import mishaps
from demo.tally import Kind, Outcome, Tally
from grpc_server.domain import types as domain

SERVICES = ("travel-desk", "finance-bot", "support-tool")
MAX_TOKENS = 64
MOST_IN_FLIGHT = 5
CHAT_TIMEOUT_S = 120.0
SHORT_TIMEOUT_S = 0.5  # too little for the 64 tokens of a model that never stops
# After so many requests that are meant to be answered, one that goes wrong.
MISHAP_EVERY = 10
_TOO_LATE = (DeadlineExceeded, ResourceExhausted)
"""A busy server refuses at once what it could not answer in time."""
_MISHAPS: tuple[Kind, ...] = ("cancelled", "timed out", "malformed")


class Asked(Protocol):
    """A question with the answer that it should have: an item of the leaderboard."""

    @property
    def id(self) -> str:
        """Its own, of all."""

    @property
    def messages(self) -> Sequence[domain.Message]:
        """What is said."""

    @property
    def tools(self) -> Sequence[domain.Tool]:
        """What may be called."""

    @property
    def answer(self) -> domain.Message:
        """What is shown as feedback."""


@dataclass(frozen=True, slots=True)
class Service:
    """One that asks: its name, its token, its connections."""

    name: str
    token: str
    client: AsyncClient
    channel: grpc.aio.Channel  # for what the typed client refuses to send


@asynccontextmanager
async def connected(server: str, tokens: dict[str, str]) -> AsyncIterator[list[Service]]:
    """The services of `tokens` (name to token), connected to `server`."""
    async with AsyncExitStack() as stack:
        services = []
        for name, token in tokens.items():
            client = await stack.enter_async_context(AsyncClient(server, token))
            channel = connection(server, token).open_async()
            stack.push_async_callback(channel.close, None)
            services.append(Service(name, token, client, channel))
        yield services


class Player:
    """Plays items for the services in turn, and keeps the tally.

    `run_id` begins the session ids, one session a request: each question is a conversation of its own.
    `shown` is told of each item whose answer was shown.
    """

    def __init__(
        self,
        services: Sequence[Service],
        tally: Tally,
        run_id: str,
        shown: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.tally = tally
        self._shown = shown
        self.in_flight = 0
        self._services = itertools.cycle(services)
        self._run_id = run_id
        self._numbers = itertools.count(1)
        self._malformed = mishaps.in_turn()

    async def play(self, items: Sequence[Asked], *, seconds: float, in_flight: int) -> None:
        """Ask each item once, evenly over `seconds`, with mishaps between; at most `in_flight` at once.

        A server that is slower than that is not overrun: it takes longer instead.
        """
        jobs = self._jobs(items)
        count = len(items) + len(items) // MISHAP_EVERY
        started = time.monotonic()
        due = (started + number * seconds / count for number in itertools.count())

        async def worker() -> None:
            for job in jobs:  # shared: each job goes to the first who is free
                await asyncio.sleep(max(0.0, next(due) - time.monotonic()))
                await job()

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(worker())

    async def trickle(self, items: Sequence[Asked], pace: Callable[[], float], stop: asyncio.Event) -> None:
        """Ask the items again and again, one every `pace()` seconds, until `stop`; wait for the last answers.

        These answers get no feedback, as most in life. Where the machine is slower than that, none is asked
        while `MOST_IN_FLIGHT` wait.
        """
        async with asyncio.TaskGroup() as group:
            for item in itertools.cycle(items):
                if self.in_flight < MOST_IN_FLIGHT:
                    group.create_task(self.ask(item, feedback=False))
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pace())
                if stop.is_set():
                    return

    def _jobs(self, items: Sequence[Asked]) -> Iterator[Callable[[], Awaitable[object]]]:
        kinds = itertools.cycle(_MISHAPS)
        for number, item in enumerate(items, start=1):
            yield partial(self.ask, item)
            if number % MISHAP_EVERY == 0:
                yield partial(self._go_wrong, next(kinds), item)

    async def ask(
        self, item: Asked, *, feedback: bool = True, on_event: Callable[[ChatEvent], None] | None = None
    ) -> Outcome:
        """One request that is meant to be answered, and the published answer as feedback on it."""
        service = next(self._services)
        self.in_flight += 1
        try:
            outcome = await self._chat("request", service, item, CHAT_TIMEOUT_S, on_event=on_event)
            if feedback and outcome.status == "OK":
                outcome = await self._feed_back(service, item, outcome)
        finally:
            self.in_flight -= 1
        self.tally.add(outcome)
        return outcome

    async def _go_wrong(self, kind: Kind, item: Asked) -> None:
        service = next(self._services)
        if kind == "malformed":
            malformed = next(self._malformed)
            status = await mishaps.send(malformed, service.channel, service.token)
            outcome = Outcome(kind, service.name, status, status in malformed.refusals, detail=malformed.name)
        elif kind == "cancelled":
            outcome = await self._chat(kind, service, item, CHAT_TIMEOUT_S, cancel=True)
        else:
            outcome = await self._chat(kind, service, item, SHORT_TIMEOUT_S)
        self.tally.add(outcome)

    async def _chat(
        self,
        kind: Kind,
        service: Service,
        item: Asked,
        timeout_s: float,
        *,
        cancel: bool = False,
        on_event: Callable[[ChatEvent], None] | None = None,
    ) -> Outcome:
        """One chat; `cancel` it as soon as it has begun."""
        inference_id = model_version = ""
        ttft_ms: float | None = None
        started = time.perf_counter()
        try:
            async with aclosing(
                service.client.chat(
                    messages(item),
                    tools=tools(item),
                    sampling=Sampling(temperature=0, max_tokens=MAX_TOKENS),
                    session_id=f"{self._run_id}-{next(self._numbers)}",
                    timeout_s=timeout_s,
                )
            ) as events:
                async for event in events:
                    if on_event is not None:
                        on_event(event)
                    if isinstance(event, Started):
                        inference_id, model_version = event.inference_id, event.model_version
                        if cancel:
                            break
                    elif ttft_ms is None and isinstance(event, TextDelta | ToolCall):
                        ttft_ms = (time.perf_counter() - started) * 1000
        except AgentLoopError as error:
            status = error.code.name if isinstance(error, RpcError) else "INCOMPLETE"
            expected = kind == "timed out" and isinstance(error, _TOO_LATE)
            return Outcome(
                kind, service.name, status, expected, inference_id, model_version, detail=str(error)
            )
        status = "CANCELLED" if cancel else "OK"
        measured = ttft_ms if kind == "request" else None
        return Outcome(kind, service.name, status, True, inference_id, model_version, measured)

    async def _feed_back(self, service: Service, item: Asked, outcome: Outcome) -> Outcome:
        try:
            await service.client.submit_feedback(outcome.inference_id, demonstration=answer(item))
        except AgentLoopError as error:
            status = error.code.name if isinstance(error, RpcError) else "INCOMPLETE"
            return Outcome(
                "request",
                service.name,
                status,
                False,
                outcome.inference_id,
                outcome.model_version,
                outcome.ttft_ms,
                f"its feedback: {error}",
            )
        self.tally.feedbacks += 1
        self._shown(item.id)
        return outcome


def messages(item: Asked) -> list[Message]:
    """The item's question, for the client."""
    return [Message(turn.role.value, turn.content) for turn in item.messages]


def answer(item: Asked) -> Message:
    """The item's right answer, for the client."""
    calls = tuple(ToolCall(call.name, call.arguments) for call in item.answer.tool_calls)
    return Message("assistant", item.answer.content, tool_calls=calls)


def tools(item: Asked) -> list[Tool]:
    """The item's functions, for the client."""
    return [Tool(tool.name, tool.description, tool.parameters) for tool in item.tools]
