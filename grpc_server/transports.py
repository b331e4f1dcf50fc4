"""Take calls over gRPC and HTTP, on parts that someone else put together, and stop in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import Tracer

from agentloop.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    gpu_pb2,
    gpu_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    log_pb2,
    log_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from grpc_server.audit import Audit
from grpc_server.background import in_background
from grpc_server.domain.errors import Precondition
from grpc_server.domain.ports import Authenticator, Engine, LogReader, Routes, Spool
from grpc_server.handover import Handover
from grpc_server.http.app import make_app
from grpc_server.http.listener import join_address, listening
from grpc_server.inference import Inference
from grpc_server.interceptors.auth import AuthInterceptor
from grpc_server.interceptors.errors import ErrorInterceptor
from grpc_server.interceptors.tracing import TraceInterceptor
from grpc_server.metrics import Metrics
from grpc_server.readiness import Readiness
from grpc_server.servicers.feedback import FeedbackServicer
from grpc_server.servicers.gpu import GpuServicer
from grpc_server.servicers.health import HealthServicer
from grpc_server.servicers.inference import InferenceServicer
from grpc_server.servicers.log import LogServicer
from grpc_server.servicers.models import ModelServicer
from grpc_server.settings import Settings, is_loopback, split_address
from grpc_server.tls import Certificates
from grpc_server.tracing import silent

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Above the API's 1 MiB of text, so that what is too large is refused with a sentence."""
STOP_SECONDS = 2.0
"""What short calls get to finish once all streams have ended."""
WATCH_SECONDS = 2.0

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    log_pb2.DESCRIPTOR.services_by_name["LogService"].full_name,
    feedback_pb2.DESCRIPTOR.services_by_name["FeedbackService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    gpu_pb2.DESCRIPTOR.services_by_name["GpuService"].full_name,
)

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 1000),
    # gRPC's core cancels what the event loop has not taken for 30 s, and its caller, who still waits, reads
    # CANCELLED. Until when it waits, the caller says.
    ("grpc.server_max_unrequested_time_in_server", 3600),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that takes calls; over TLS on both addresses, or on neither."""

    grpc_address: str
    http_address: str
    tls: bool = False

    def urls(self) -> dict[str, str]:
        """Where it is, by protocol: for the client (AGENTLOOP_SERVER), and for what speaks HTTP."""
        secure = "s" if self.tls else ""
        return {
            "grpc_url": f"grpc{secure}://{self.grpc_address}",
            "http_url": f"http{secure}://{self.http_address}",
        }


@contextlib.asynccontextmanager
async def listen(
    settings: Settings,
    *,
    inference: Inference,
    engine: Engine,
    spool: Spool,
    reader: LogReader,
    routes: Routes,
    authenticator: Authenticator,
    audit: Audit,
    handover: Handover,
    check_store: Callable[[], Awaitable[object]],
    metrics: Metrics,
    tracer: Tracer | None = None,
) -> AsyncIterator[Running]:
    """Take calls while the block runs. Then: NOT_SERVING, streams finish or end, listeners close.

    What it is given stays open: whoever opened it closes it.

    Raises:
        Precondition: for an address that other machines reach, without TLS, unless `allow_plaintext`; for
            TLS files that are none.
        OSError: if an address cannot be had.
    """
    refuse_plaintext(settings)
    tracer = tracer or silent()
    admission = inference.admission
    metrics.watch(spool=spool.state, admission=admission)
    metrics.watch_handover(handover)
    readiness = Readiness(engine, spool, routes, check_store, handover.away)
    health = HealthServicer(SERVICES)
    async with contextlib.AsyncExitStack() as stack:
        app = make_app(
            readiness,
            metrics,
            inference=inference,
            engine=engine,
            routes=routes,
            authenticator=authenticator,
            tracer=tracer,
            unread_seconds=settings.unread_seconds,
        )
        certificates = await stack.enter_async_context(_certificates(settings))
        context = None if certificates is None else certificates.http_context()
        http_address = await stack.enter_async_context(listening(app, settings.http_address, context))
        listener = grpc.aio.server(
            options=OPTIONS,
            interceptors=[
                TraceInterceptor(tracer),
                ErrorInterceptor(),
                AuthInterceptor(authenticator, audit),
            ],
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(inference, unread_seconds=settings.unread_seconds), listener
        )
        log_pb2_grpc.add_LogServiceServicer_to_server(LogServicer(reader), listener)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(
            FeedbackServicer(spool, logged=metrics.fed_back), listener
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(
                engine,
                routes,
                audit,
                max_bytes=int(settings.models_max_bytes),
                refuse_loading=handover.refuse_loading,
            ),
            listener,
        )
        gpu_pb2_grpc.add_GpuServiceServicer_to_server(GpuServicer(handover), listener)
        health_pb2_grpc.add_HealthServicer_to_server(health, listener)
        reflection.enable_server_reflection(
            (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            listener,
        )
        grpc_address = _bind(listener, settings.grpc_address, certificates)
        await _tell(health, metrics, readiness)
        await listener.start()
        stack.push_async_callback(listener.stop, min(settings.grace_seconds, STOP_SECONDS))
        watch = asyncio.create_task(_watch(health, metrics, readiness), name="watch")

        async def close() -> None:
            readiness.closing = True
            watch.cancel()
            health.set(False)
            log.info("shutting down", extra={"in_flight": admission.in_flight, "queued": admission.queued})
            await inference.drain(settings.grace_seconds)

        stack.push_async_callback(close)
        yield Running(grpc_address, http_address, certificates is not None)


def refuse_plaintext(settings: Settings) -> None:
    """Raises Precondition if tokens and prompts would cross a network unencrypted."""
    if settings.tls_cert_file is not None:
        return
    for name in ("grpc_address", "http_address"):
        address = getattr(settings, name)
        if not is_loopback(address) and not settings.allow_plaintext:
            raise Precondition(
                f"{name} is {address}, which other machines reach, and there is no encryption; set"
                " tls_cert_file and tls_key_file, listen on 127.0.0.1, or set allow_plaintext=true where the"
                " network is private"
            )


@contextlib.asynccontextmanager
async def _certificates(settings: Settings) -> AsyncIterator[Certificates | None]:
    """The certificates that are set, read again while the block runs."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        yield None
        return
    certificates = Certificates(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    async with in_background(certificates.keep_reading(), "read certificates"):
        yield certificates


def _bind(listener: grpc.aio.Server, address: str, certificates: Certificates | None) -> str:
    host, _ = split_address(address)
    try:
        if certificates is None:
            port = listener.add_insecure_port(address)
        else:
            port = listener.add_secure_port(address, certificates.grpc_credentials())
    except RuntimeError as error:
        raise OSError(f"grpc_address {address} cannot be had: is another server running there?") from error
    return join_address(host, port)


async def _watch(health: HealthServicer, metrics: Metrics, readiness: Readiness) -> None:
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        await _tell(health, metrics, readiness)


async def _tell(health: HealthServicer, metrics: Metrics, readiness: Readiness) -> None:
    state = await readiness.state()
    metrics.engine_is(state.engine.ok)
    metrics.store_is(state.store.ok)
    health.set(state.ready)
