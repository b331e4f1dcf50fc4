"""Serve an app on a socket of ours, inside a loop that has other work, and leave signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from grpc_server.http.access import MAX_BODY_BYTES
from grpc_server.settings import split_address

CONNECTIONS = 1024
"""Beyond these a request gets 503: more than callers may have open (`app.MAX_OPEN`)."""
HEAD_SECONDS = 10.0
"""What a request's head gets to arrive."""
UNREAD_SECONDS = 60
"""A connection whose other end takes nothing that long is closed, whatever waits in its buffers."""


class _Punctual(H11Protocol):
    """Closes a connection that is slow with a request's head; uvicorn would wait for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()


class _Answering(WebSocketsSansIOProtocol):
    """Sends the refusal of a handshake that cannot be read; uvicorn would leave its caller waiting.

    A header, or the path, may have 8 KiB (431, 414); what is no handshake at all gets 400.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.close_sent:
            self.handshake_complete = self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()) or _NO_HANDSHAKE)
            self.transport.close()


_NO_HANDSHAKE = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Quiet(uvicorn.Server):
    """Uvicorn without its signal handlers: the whole server's shutdown has one order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def listening(app: FastAPI, address: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve while the block runs, over TLS where a context is given; gives the address with its real port.

    Raises:
        OSError: if the address cannot be had.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    _watch_over(listener)
    config = uvicorn.Config(
        app,
        http=_Punctual,  # h11, which bounds a request's head; the other parser that uvicorn has does not
        ws=_Answering,
        ws_max_size=MAX_BODY_BYTES,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
        limit_concurrency=CONNECTIONS,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        yield join_address(host, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listener.close()


def _watch_over(listener: socket.socket) -> None:
    """Have the kernel close connections whose other end is gone, or takes nothing; they inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options: dict[str, Any] = {
        "TCP_KEEPIDLE": 30,
        "TCP_KEEPINTVL": 10,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": UNREAD_SECONDS * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not everywhere
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def join_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
