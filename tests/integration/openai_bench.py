"""Callers over HTTP: OpenAI's own client, and a plain one; imported by the tests of the HTTP front."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai

from tests.integration.grpc_bench import Bench

HELLO: Any = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def calling(bench: Bench, token: str = "al_infer") -> AsyncIterator[openai.AsyncOpenAI]:
    assert bench.running is not None
    url = f"http://{bench.running.http_address}/v1"
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=url, api_key=token, max_retries=0, http_client=http) as client:
        yield client


@asynccontextmanager
async def posting(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    assert bench.running is not None
    headers = {"authorization": "Bearer al_infer"}
    url = f"http://{bench.running.http_address}"
    async with httpx.AsyncClient(trust_env=False, base_url=url, headers=headers) as client:
        yield client
