"""Serve an app on a socket of ours, inside a loop that has other work, and leave signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from grpc_server.settings import split_address


class _Quiet(uvicorn.Server):
    """Uvicorn without its signal handlers: the whole server's shutdown has one order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def listening(app: FastAPI, address: str) -> AsyncIterator[str]:
    """Serve while the block runs; gives the address with its real port.

    Raises:
        OSError: if the address cannot be had.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
        limit_concurrency=256,
    )
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield join_address(host, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listener.close()


def join_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
