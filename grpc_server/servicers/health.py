"""grpc.health.v1: whether this server takes work, asked or watched.

The library's own servicer (grpc-health-checking 1.85) writes to watchers under a lock that a change of status
needs too: one watcher that does not read would keep all others, and this server's shutdown, waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as rpc

from grpc_server.domain.errors import NotFound


class HealthServicer(rpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """One status for the server (`""`) and each of `services`: NOT_SERVING until it is set."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Change the status, and wake those who watch; waits for nobody."""
        status = pb.HealthCheckResponse
        self._status = status.SERVING if serving else status.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802 - gRPC's name
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.HealthCheckResponse:
        """The status now."""
        del context
        if request.service not in self._services:
            raise NotFound(f"there is no service {request.service[:100]!a}")
        return pb.HealthCheckResponse(status=self._status)

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """The status now, and each other one that follows."""
        known = request.service in self._services
        told: int | None = None
        while True:
            changed = self._changed
            status = self._status if known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                await context.write(pb.HealthCheckResponse(status=status))
                told = status
            await changed.wait()
