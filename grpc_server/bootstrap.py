"""The only place where parts are put together. Every part is a keyword, so that a test replaces any."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from opentelemetry.trace import Tracer

from grpc_server import migrations
from grpc_server.adapters.credentials import AnyCredential, CachedAuthenticator
from grpc_server.adapters.embedded import EmbeddedEngine
from grpc_server.adapters.gpus import Gpus
from grpc_server.adapters.json_schema import Schemas
from grpc_server.adapters.jwks import Jwks, reader
from grpc_server.adapters.jwt_tokens import JwtAuthenticator, JwtRules
from grpc_server.adapters.local_postgres import LocalPostgres
from grpc_server.adapters.memory import MemoryAvailable
from grpc_server.adapters.ollama import OllamaEngine
from grpc_server.adapters.ollama_pool import OllamaPool
from grpc_server.adapters.ollama_process import OllamaProcess
from grpc_server.adapters.otlp import tracing
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.postgres_cancellations import PostgresCancellations
from grpc_server.adapters.postgres_changes import CANCELLATIONS, ROUTES, TOKENS, Read, Watch, changes
from grpc_server.adapters.postgres_leases import PostgresLeases
from grpc_server.adapters.postgres_reader import PostgresReader
from grpc_server.adapters.redacting_spool import RedactingSpool, read_key
from grpc_server.adapters.redaction_process import RedactionProcess
from grpc_server.adapters.routes import CachedRoutes
from grpc_server.adapters.spool import FileSpool
from grpc_server.adapters.traced import traced_engine, traced_spool, traced_store
from grpc_server.admission import Admission
from grpc_server.audit import Audit
from grpc_server.background import in_background
from grpc_server.domain.ports import Authenticator, Engine, LogReader, Routes, Spool
from grpc_server.domain.types import HandoverState, Limits
from grpc_server.drain import Drain
from grpc_server.first_route import load_routed, routed, routed_versions
from grpc_server.handover import Handover
from grpc_server.inference import Inference
from grpc_server.metrics import Metrics
from grpc_server.night_figures import NightFigures
from grpc_server.quotas import Quotas
from grpc_server.settings import Settings, alias_names, ollama_urls
from grpc_server.transports import Running, listen, refuse_plaintext
from grpc_server.uninterrupted import uninterrupted
from grpc_server.upkeep import Upkeep

log = logging.getLogger(__name__)

GPU_SECONDS = 2.0
COLLECTED_AFTER = 10_000
"""Objects more than before, of those that may be part of a cycle: some MiB at most."""
FLUSH_SECONDS = 10.0
"""What Postgres gets to take the rest of the spool; what it does not take stays on disk."""


@contextlib.asynccontextmanager
async def service(
    settings: Settings,
    *,
    migrate: bool = False,
    store: Any = None,
    engine: Engine | None = None,
    spool: Any = None,
    reader: LogReader | None = None,
    authenticator: Authenticator | None = None,
    routes: Routes | None = None,
    metrics: Metrics | None = None,
    tracer: Tracer | None = None,
) -> AsyncIterator[Running]:
    """A whole server, of the settings' parts where none is given; closes what it opened.

    At the end: NOT_SERVING, streams finish or end with UNAVAILABLE, the spool is flushed, then the engine and
    the database are closed.
    """
    refuse_plaintext(settings)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    metrics = metrics or Metrics()
    async with contextlib.AsyncExitStack() as stack:
        if tracer is None:
            tracer = await stack.enter_async_context(
                tracing(settings.otlp_endpoint, settings.trace_share, settings.server_id)
            )
        if store is None:
            store = await stack.enter_async_context(_postgres(settings, migrate=migrate))
            await stack.enter_async_context(_upkeep(settings, store.dsn, metrics).running())
        if spool is None:  # before the engine: its lock says that no other server works in these folders
            spool = await stack.enter_async_context(_spool(settings))
        recorded = await stack.enter_async_context(_redacting(settings, spool, metrics))
        if engine is None:
            engine = await stack.enter_async_context(engine_of(settings))
        if isinstance(engine, OllamaPool):
            metrics.watch_hosts(engine.standings)
        metrics.logged(spool.state().records)
        memory = MemoryAvailable()
        metrics.watch_memory(memory, settings.memory_floor)
        await stack.enter_async_context(_gpus(metrics))
        await stack.enter_async_context(NightFigures(settings.cycles_dir, metrics.registry).running())
        await stack.enter_async_context(_draining(spool, store, metrics, tracer))
        watched: dict[str, Read] = {}
        if authenticator is None:
            tokens = await stack.enter_async_context(_reading(_api_tokens(settings, store)))
            authenticator, watched[TOKENS] = tokens, tokens.changed_elsewhere
            if settings.jwks:
                jwts = await stack.enter_async_context(_reading(_jwts(settings)))
                authenticator = AnyCredential(tokens, jwts)
        if routes is None:
            cached = await stack.enter_async_context(_reading(_routes(settings, store)))
            routes, watched[ROUTES] = cached, cached.changed_elsewhere
        elsewhere = None
        if isinstance(store, PostgresStore):
            elsewhere = PostgresCancellations(store, settings.server_id)
            watched[CANCELLATIONS] = elsewhere.look
        if watched:
            watch = Watch(lambda: changes(store.dsn), watched)
            await stack.enter_async_context(in_background(watch.run(), "changes elsewhere"))
        await stack.enter_async_context(routed(settings, engine, routes))
        traced = traced_spool(recorded, tracer)
        inference = Inference(
            traced_engine(engine, tracer),
            traced,
            routes,
            metrics,
            admission=Admission(
                engine.parallel,
                queue_size=settings.queue_size,
                queue_per_caller=settings.queue_per_caller,
                queue_seconds=settings.queue_seconds,
                memory_available=memory,
                memory_floor=settings.memory_floor,
                tracer=tracer,
            ),
            quotas=Quotas(servers=settings.quota_servers),
            elsewhere=elsewhere,
            server_id=settings.server_id,
            default_deadline_seconds=settings.default_deadline_seconds,
        )
        if elsewhere is not None:
            elsewhere.end_here = inference.end_here
        audit = Audit(store, settings.server_id)
        await stack.enter_async_context(audit.running())
        leases = PostgresLeases(store, settings.server_id) if isinstance(store, PostgresStore) else None
        handover = _handover(settings, engine, inference, routes, audit, leases)
        await stack.enter_async_context(handover.running())
        if handover.state is HandoverState.SERVING:
            await load_routed(settings, engine, routes)
        if reader is None:
            reader = await stack.enter_async_context(PostgresReader(store.dsn))
        running = await stack.enter_async_context(
            listen(
                settings,
                inference=inference,
                engine=engine,
                spool=traced,
                reader=reader,
                routes=routes,
                authenticator=authenticator,
                audit=audit,
                handover=handover,
                check_store=store.check,
                metrics=metrics,
                tracer=tracer,
            )
        )
        stack.enter_context(_announced(settings.state_dir / "server.json", running))
        yield running


def migrate(settings: Settings) -> str:
    """Bring the database that is set, or the local one, up to date; returns what was done, for a person."""
    dsn = settings.database_url.get_secret_value()
    if dsn:
        migrations.migrate(dsn)
        return "the database is up to date"
    with LocalPostgres(settings.state_dir / "postgres") as local:
        migrations.migrate(local.dsn("agentloop"))
        return f"the local database in {local.data_dir} is up to date"


async def serve(settings: Settings, *, migrate: bool = False) -> None:
    """Run a server until SIGTERM or SIGINT, which also ends a start that is under way.

    A second signal cuts short whatever the shutdown waits for; then it raises CancelledError.
    """
    loop = asyncio.get_running_loop()
    main, stop, ready, forced = asyncio.current_task(), asyncio.Event(), False, False
    assert main is not None  # noqa: S101 - we run in it

    def on_signal() -> None:
        nonlocal forced
        if stop.is_set():
            log.warning("forced to stop")
            forced = True
        if forced or not ready:
            main.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        async with service(settings, migrate=migrate) as running:
            ready = True
            _leave_to_stay()
            addresses = {"grpc_address": running.grpc_address, "http_address": running.http_address}
            log.info("ready", extra=addresses)
            await stop.wait()
    except asyncio.CancelledError:
        if ready or forced or not stop.is_set():
            raise
        main.uncancel()
    log.info("stopped")


def _leave_to_stay() -> None:
    """Have the garbage collector pass over what was made by now, and look for cycles less often.

    A server's modules and parts are 160,000 objects. To look through them took a seventh of the processor's
    time under load, and held every stream up for 80 ms now and then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_AFTER)


@contextlib.asynccontextmanager
async def _postgres(settings: Settings, *, migrate: bool) -> AsyncIterator[PostgresStore]:
    """The database that is set, or a local one, brought up to date."""
    async with contextlib.AsyncExitStack() as stack:
        dsn = settings.database_url.get_secret_value()
        if not dsn:
            local = await stack.enter_async_context(_started(LocalPostgres(settings.state_dir / "postgres")))
            dsn = await asyncio.to_thread(local.dsn, "agentloop")
            migrate = True
        if migrate:
            await uninterrupted(asyncio.to_thread(migrations.migrate, dsn))
        store = PostgresStore(dsn)
        await store.open()
        stack.push_async_callback(store.close)
        yield store


def _upkeep(settings: Settings, dsn: str, metrics: Metrics) -> Upkeep:
    return Upkeep(
        dsn,
        metrics,
        spool_dir=settings.spool_dir,
        cycles_dir=settings.cycles_dir,
        retain_months=settings.log_retain_months,
        keep_unlearned=settings.log_keep_unlearned,
        actor=settings.server_id,
    )


@contextlib.asynccontextmanager
async def _started(local: LocalPostgres) -> AsyncIterator[LocalPostgres]:
    """`local`, entered and left in threads."""

    async def leave() -> None:
        await asyncio.to_thread(local.__exit__, None, None, None)

    try:
        await uninterrupted(asyncio.to_thread(local.__enter__))
    except asyncio.CancelledError:  # it has started all the same
        await leave()
        raise
    try:
        yield local
    finally:
        await leave()


@contextlib.asynccontextmanager
async def engine_of(settings: Settings) -> AsyncIterator[Engine]:
    """The engine that is set; an Ollama is started where no URL of one is."""
    if settings.engine == "embedded":
        async with EmbeddedEngine(
            settings.state_dir / "models" / "versions",
            context_tokens=settings.context_tokens,
            parallel=settings.parallel,
            threads=settings.threads,
        ) as engine:
            yield engine
        return
    async with contextlib.AsyncExitStack() as stack:
        urls = ollama_urls(settings.ollama_url)
        if not urls:
            process = OllamaProcess(
                settings.ollama_bin, settings.state_dir / "ollama", parallel=settings.parallel
            )
            urls = [(await stack.enter_async_context(process)).url]
        schemas = Schemas()  # one process checks schemas for all
        engines = {
            url: OllamaEngine(
                url, context_tokens=settings.context_tokens, parallel=settings.parallel, schemas=schemas
            )
            for url in urls
        }
        if len(urls) > 1:
            yield await stack.enter_async_context(OllamaPool(engines))
        else:
            yield await stack.enter_async_context(engines[urls[0]])


@contextlib.asynccontextmanager
async def _gpus(metrics: Metrics) -> AsyncIterator[None]:
    """Look at the GPUs all the while, where there are any; in a thread, as a driver may hang."""
    gpus = Gpus()

    async def look() -> None:
        while gpus.there:
            metrics.gpus_are(await asyncio.to_thread(gpus.read))
            await asyncio.sleep(GPU_SECONDS)

    with contextlib.closing(gpus):
        async with in_background(look(), "gpus"):
            yield


@contextlib.asynccontextmanager
async def _spool(settings: Settings) -> AsyncIterator[FileSpool]:
    spool = FileSpool(
        settings.spool_dir,
        settings.server_id,
        int(settings.spool_max_bytes),
        max_records=settings.spool_max_records,
        keep_seconds=settings.spool_keep_seconds,
    )
    await spool.open()
    try:
        yield spool
    finally:
        await spool.close()


@contextlib.asynccontextmanager
async def _redacting(settings: Settings, spool: Spool, metrics: Metrics) -> AsyncIterator[RedactingSpool]:
    """What the pipeline writes to; the spool's other end sees only what may be kept."""
    finder = RedactionProcess()
    key = await asyncio.to_thread(read_key, settings.redaction_key_file)
    starting = asyncio.create_task(finder.start() if settings.redaction != "off" else asyncio.sleep(0))
    try:
        yield RedactingSpool(spool, finder, settings.redaction, key, redacted=metrics.redacted)
    finally:
        await finder.close()
        await starting


@contextlib.asynccontextmanager
async def _draining(spool: Any, store: Any, metrics: Metrics, tracer: Tracer) -> AsyncIterator[Drain]:
    """Store what the spool holds, all the while, and at the end what is left of it."""
    drain = Drain(
        spool,
        traced_store(store, tracer),
        dead_letters=store,
        stored=metrics.stored,
        dead_lettered=metrics.dead_lettered,
    )
    try:
        async with in_background(drain.run(), "drain"):
            yield drain
    finally:
        if not await drain.flush(FLUSH_SECONDS):
            log.warning("the database did not take all records", extra={"left": spool.state().records})


class _Reads(Protocol):
    """Reads something at its start, and again and again until it is closed."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


Part = TypeVar("Part", bound=_Reads)


@contextlib.asynccontextmanager
async def _reading(part: Part) -> AsyncIterator[Part]:
    await part.start()
    try:
        yield part
    finally:
        await part.close()


def _api_tokens(settings: Settings, store: Any) -> CachedAuthenticator:
    return CachedAuthenticator(store, settings.state_dir / "cache" / "tokens.json", settings.cache_seconds)


def _routes(settings: Settings, store: Any) -> CachedRoutes:
    return CachedRoutes(store, settings.state_dir / "cache" / "routes.json", settings.cache_seconds)


def _jwts(settings: Settings) -> JwtAuthenticator:
    return JwtAuthenticator(_jwks(settings), _jwt_rules(settings))


def _jwks(settings: Settings) -> Jwks:
    return Jwks(
        reader(settings.jwks),
        refresh_seconds=settings.jwks_refresh_seconds,
        retry_seconds=settings.jwks_retry_seconds,
        max_age_seconds=settings.jwks_max_age_seconds,
    )


def _jwt_rules(settings: Settings) -> JwtRules:
    return JwtRules(
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        leeway_seconds=settings.jwt_leeway_seconds,
        max_bytes=settings.jwt_max_bytes,
        scopes_claim=settings.jwt_scopes_claim,
        scope_prefix=settings.jwt_scope_prefix,
        name_claim=settings.jwt_name_claim,
        limits=_jwt_limits(settings),
        limits_claim=settings.jwt_limits_claim,
    )


def _jwt_limits(settings: Settings) -> Limits:
    return Limits(
        settings.jwt_requests_per_minute or None,
        settings.jwt_tokens_per_minute or None,
        settings.jwt_concurrent_streams or None,
        alias_names(settings.jwt_aliases) if settings.jwt_aliases else None,
    )


def _handover(
    settings: Settings,
    engine: Engine,
    inference: Inference,
    routes: Routes,
    audit: Audit,
    leases: PostgresLeases | None,
) -> Handover:
    return Handover(
        engine,
        inference,
        lambda: routed_versions(routes),
        audit,
        leases,
        mode=settings.gpu_handover,
        lease_seconds=settings.gpu_lease_seconds,
        max_seconds=settings.gpu_lease_max_seconds,
        drain_seconds=settings.gpu_drain_seconds,
        small_context_tokens=settings.gpu_small_context_tokens,
    )


@contextlib.contextmanager
def _announced(path: Path, running: Running) -> Iterator[None]:
    """`server.json`, for those who look for a server's addresses, while it runs."""
    addresses = {"grpc_address": running.grpc_address, "http_address": running.http_address}
    content = {**addresses, **running.urls(), "pid": os.getpid()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
