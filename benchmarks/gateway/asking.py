"""Asks an engine, the gateway or LiteLLM's proxy, and times what comes, in a process of its own.

Each by the leanest client there is for it: aiohttp for HTTP, grpc.aio's stub for gRPC. Connections stay open.
Every prompt begins with another number: no engine can have it in its cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc

from agentloop.v1 import inference_pb2 as pb
from agentloop.v1 import inference_pb2_grpc as rpc
from grpc_server.domain import chat_format
from grpc_server.domain.types import Message, Role, Sampling

DEFAULT = Sampling()
"""How the gateway asks where a caller says nothing: the engine is asked directly for the same."""
Times = tuple[float, float]
"""Milliseconds to the first text, and to the end."""


@dataclass(frozen=True)
class Asked:
    """Who is asked for what; one line of JSON on standard input."""

    path: str
    url: str
    model: str
    token: str
    streams: int
    requests: int
    tokens: int
    cores: list[int] = field(default_factory=list)
    context_tokens: int = 0


class Asker:
    """Keeps connections to all."""

    def __init__(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        self._http = aiohttp.ClientSession(connector=connector, trust_env=False)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._chance = random.Random()

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()
        await asyncio.gather(*(channel.close(None) for channel in self._channels.values()))

    async def round(self, asked: Asked) -> dict[str, list[float]]:
        """`requests` answers over `streams` streams, each asking anew as soon as it has its answer."""
        left = iter(range(asked.requests))
        times: list[Times] = []
        failed: list[str] = []
        ask = {"direct": self._direct, "gateway": self._gateway, "litellm": self._litellm}[asked.path]

        async def stream(number: int) -> None:
            # Not all at the same moment: no callers are.
            await asyncio.sleep(0.2 * number / asked.streams if asked.streams > 8 else 0)
            for _ in left:
                try:
                    times.append(await ask(asked, self._question()))
                except (grpc.aio.AioRpcError, aiohttp.ClientError, RuntimeError) as error:
                    failed.append(f"{asked.path}: {error!r}")

        await asyncio.gather(*(stream(number) for number in range(asked.streams)))
        for text in failed:
            print(text, file=sys.stderr)
        return {
            "first": [first for first, _ in times],
            "total": [total for _, total in times],
            "failed": [float(len(failed))],
        }

    def _question(self) -> str:
        return f"{self._chance.randrange(10**8):08d}: why?"

    async def _direct(self, asked: Asked, question: str) -> Times:
        body = {
            "model": asked.model,
            "prompt": chat_format.render((Message(Role.USER, question),), ()),
            "raw": True,
            "stream": True,
            "keep_alive": -1,
            "shift": False,
            "truncate": False,
            "options": {
                "num_ctx": asked.context_tokens,
                "num_batch": 512,
                "num_predict": asked.tokens,
                "temperature": 0,
                "top_p": DEFAULT.top_p,
                "top_k": DEFAULT.top_k,
                "min_p": 0.0,
                "repeat_penalty": 1.0,
                "seed": -1,
                "stop": list(chat_format.STOP),
            },
        }
        first = 0.0
        began = time.perf_counter()
        async with self._http.post(f"{asked.url}/api/generate", json=body) as response:
            _check(response)
            async for line in response.content:
                event = json.loads(line)
                if not first and event.get("response"):
                    first = time.perf_counter()
        return _times(began, first)

    async def _litellm(self, asked: Asked, question: str) -> Times:
        body = {
            "model": asked.model,
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "max_tokens": asked.tokens,
            "temperature": 0,
        }
        headers = {"Authorization": f"Bearer {asked.token}"}
        first = 0.0
        began = time.perf_counter()
        url = f"{asked.url}/v1/chat/completions"
        async with self._http.post(url, json=body, headers=headers) as response:
            _check(response)
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if not first and choices and choices[0]["delta"].get("content"):
                        first = time.perf_counter()
        return _times(began, first)

    async def _gateway(self, asked: Asked, question: str) -> Times:
        if asked.url not in self._channels:
            self._channels[asked.url] = grpc.aio.insecure_channel(asked.url)
        chat: Any = rpc.InferenceServiceStub(self._channels[asked.url]).Chat
        request = pb.ChatRequest(
            messages=[pb.Message(role=pb.ROLE_USER, content=question)],
            sampling=pb.SamplingOptions(temperature=0, max_tokens=asked.tokens),
        )
        first = 0.0
        began = time.perf_counter()
        async for event in chat(request, metadata=(("authorization", f"Bearer {asked.token}"),)):
            if not first and event.HasField("text_delta"):
                first = time.perf_counter()
        return _times(began, first)


def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise RuntimeError(f"{response.url} answered with {response.status}")


def _times(began: float, first: float) -> Times:
    """An answer without a text has its end for its first: it is as late."""
    ended = time.perf_counter()
    return ((first or ended) - began) * 1000, (ended - began) * 1000


async def main() -> None:
    asker = Asker()
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = Asked(**json.loads(line))
        if asked.cores:
            os.sched_setaffinity(0, asked.cores)
            for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 - numbers, no paths
                os.sched_setaffinity(int(thread), asked.cores)
        print(json.dumps(await asker.round(asked)), flush=True)
    await asker.close()


if __name__ == "__main__":
    asyncio.run(main())
