"""Handwritten stand-ins for every port. They keep what they were asked, and fail when they are told to."""

from __future__ import annotations

import asyncio
import hashlib
import stat
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from grpc_server.adapters.json_schema_child import unfit, unholdable
from grpc_server.domain.errors import (
    AlreadyExists,
    Conflict,
    EngineUnavailable,
    NotFound,
    Precondition,
    SpoolFull,
    StoreUnavailable,
    Unauthenticated,
)
from grpc_server.domain.log_query import LogFilter, LoggedInference, LogPage, id_range
from grpc_server.domain.ports import Finished, Generation, Piece, SpoolState, TokenRecord
from grpc_server.domain.types import (
    Caller,
    Embeddings,
    Feedback,
    FinishReason,
    InferenceEnded,
    InferenceStarted,
    InstallPhase,
    InstallProgress,
    KeptLease,
    Limits,
    LogRecord,
    ModelDetails,
    ModelVersion,
    Route,
    Scope,
    Status,
    Target,
    TargetRole,
    Timings,
    Usage,
)

BASE = "gemma-3-270m:base"


class FakeClock:
    """A clock that moves only when told to: `now()` in UTC, `monotonic()` in seconds."""

    def __init__(self, start: datetime = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) -> None:
        self.time = start
        self.seconds = 1000.0

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
        self.seconds += seconds


class FakeEngine:
    """Streams `reply(generation)`, a piece a token; keeps every generation in `asked`.

    `hold` (an event) keeps each stream waiting before its piece number `hold_at`; `fail` is raised there
    instead of, or after, waiting. With `tells`, each piece says what was read and written so far. `counted`
    keeps the prompts whose tokens (here: words) were counted, which waits for `hold_count`, as installing
    does for `hold_install`. `running` is how many streams are open, `stopped` those closed early.
    """

    def __init__(
        self,
        reply: Sequence[str] | Callable[[Generation], Sequence[str]] = ("Hello", ", ", "world", "!"),
        *,
        name: str = "embedded",
        parallel: int = 4,
        models: Iterable[str] = (BASE,),
        finish_reason: FinishReason = FinishReason.STOP,
        fail: BaseException | None = None,
        hold: asyncio.Event | None = None,
        hold_at: int = 0,
        down: bool = False,
        tells: bool = False,
    ) -> None:
        self.tells = tells
        self.name = name
        self.parallel = parallel
        self.reply = reply
        self.finish_reason = finish_reason
        self.fail = fail
        self.hold = hold
        self.hold_at = hold_at
        self.down = down
        self.models = {model: ModelVersion(model, "0" * 64, 1, loaded=True) for model in models}
        self.asked: list[Generation] = []
        self.embedded: list[tuple[str, tuple[str, ...]]] = []
        self.counted: list[str] = []
        self.hold_count: asyncio.Event | None = None
        self.hold_install: asyncio.Event | None = None
        self.running = 0
        self.stopped: list[Generation] = []
        self.streaming = asyncio.Event()
        self.small: int | None = None
        self.closed = False

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        self.asked.append(generation)
        self._look_up(generation.model_version)
        pieces, reason = self._cut(generation)
        self.running += 1
        ended = False
        try:
            for index, piece in enumerate(pieces):
                await self._point(index)
                so_far = Usage(len(generation.prompt.split()), index + 1)
                yield Piece(piece, so_far if self.tells else None)
            await self._point(len(pieces))
            ended = True
            yield Finished(reason, Usage(len(generation.prompt.split()), len(pieces)))
        finally:
            self.running -= 1
            if not ended:
                self.stopped.append(generation)

    async def embed(self, model_version: str, texts: Sequence[str]) -> Embeddings:
        self._look_up(model_version)
        self.embedded.append((model_version, tuple(texts)))
        digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
        vectors = tuple(tuple(byte / 255 for byte in digest) for digest in digests)
        return Embeddings(vectors, sum(len(text.split()) for text in texts))

    async def count_tokens(self, model_version: str, prompt: str) -> int:
        self._look_up(model_version)
        self.counted.append(prompt)
        if self.hold_count is not None:
            await self.hold_count.wait()
        return len(prompt.split())

    async def list_models(self) -> list[ModelVersion]:
        await self.check()
        return [self.models[name] for name in sorted(self.models)]

    async def load(self, model_version: str) -> None:
        self._look_up(model_version)
        self.models[model_version] = replace(self.models[model_version], loaded=True)

    async def unload(self, model_version: str) -> None:
        self._look_up(model_version)
        self.models[model_version] = replace(self.models[model_version], loaded=False)

    async def show(self, model_version: str) -> ModelDetails:
        self._look_up(model_version)
        return ModelDetails("gemma3", 268_098_176, "Q4_K_M", 32_768)

    async def install(
        self, name: str, path: Path, sha256: str, progress: InstallProgress | None = None
    ) -> bool:
        await self.check()
        if progress is not None:
            progress.begin(InstallPhase.COPYING, 100)
            progress.done_bytes = 50
        if self.hold_install is not None:
            await self.hold_install.wait()
        try:
            content = await asyncio.to_thread(_content, path)
        except OSError as error:
            raise Precondition(f"{path} cannot be read: {error.strerror}") from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise Precondition(f"{path} has sha256 {found}, not {sha256}")
        if not content.startswith(b"GGUF"):
            raise Precondition(f"{path} is not a GGUF")
        if name in self.models:
            if self.models[name].sha256 != sha256:
                raise AlreadyExists(f"{name} is installed with other bytes")
            return False
        self.models[name] = ModelVersion(name, sha256, len(content))
        return True

    async def remove(self, name: str) -> bool:
        await self.check()
        return self.models.pop(name, None) is not None

    async def shrink(self, context_tokens: int) -> None:
        await self._move(context_tokens)

    async def grow(self) -> None:
        await self._move(None)

    async def _move(self, small: int | None) -> None:
        await self.check()
        self.small = small
        self.models = {name: replace(model, loaded=False) for name, model in self.models.items()}

    async def check(self) -> None:
        if self.down:
            raise EngineUnavailable("the engine is down")

    async def close(self) -> None:
        self.closed = True

    def _look_up(self, model_version: str) -> None:
        if self.down:
            raise EngineUnavailable("the engine is down")
        if model_version not in self.models:
            raise NotFound(f"no model version {model_version} is installed")

    def _cut(self, generation: Generation) -> tuple[list[str], FinishReason]:
        pieces = list(self.reply(generation) if callable(self.reply) else self.reply)
        text = "".join(pieces)
        ends = [text.find(stop) for stop in (*generation.stop, *generation.sampling.stop) if stop in text]
        reason = self.finish_reason
        if ends:
            pieces, reason = [text[: min(ends)]] if min(ends) else [], FinishReason.STOP
        if len(pieces) > generation.sampling.max_tokens:
            pieces, reason = pieces[: generation.sampling.max_tokens], FinishReason.LENGTH
        return pieces, reason

    async def _point(self, index: int) -> None:
        if index != self.hold_at:
            return
        self.streaming.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.fail is not None:
            raise self.fail


def _content(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):
        raise Precondition(f"{path} is not a regular file")
    return path.read_bytes()


class FakeSpool:
    """Keeps records in a list. `full` refuses starts and feedback, `broken` is raised by every append.

    `hold` (an event) keeps each append waiting, as a slow disk does.
    """

    def __init__(self, *, full: bool = False, max_bytes: int = 1024**3) -> None:
        self.records: list[LogRecord] = []
        self.full = full
        self.retry_after_seconds = 5.0
        self.broken: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.max_bytes = max_bytes
        self.committed = 0
        self.history = ""
        self.dead: list[tuple[object, str]] = []
        self.closed = False
        self.opened = False

    async def open(self) -> None:
        self.opened = True

    async def append(self, record: LogRecord) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if self.broken is not None:
            raise self.broken
        if self.full and isinstance(record, InferenceStarted | Feedback):
            refusal = SpoolFull("the spool is full; try again when Postgres has taken some of it")
            refusal.retry_after_seconds = self.retry_after_seconds
            raise refusal
        self.records.append(record)

    def state(self) -> SpoolState:
        waiting = len(self.records) - self.committed
        return SpoolState(
            waiting, self.max_bytes if self.full else waiting, float(waiting > 0), self.max_bytes
        )

    async def read_batch(self, limit: int) -> list[tuple[int, LogRecord]]:
        waiting = self.records[self.committed : self.committed + limit]
        return list(enumerate(waiting, start=self.committed + 1))

    async def commit(self, position: int) -> None:
        self.committed = position

    async def remember(self, history: str) -> int:
        again = self.committed if self.history not in ("", history) else 0
        self.history, self.committed = history, self.committed - again
        return again

    async def dead_letter(self, position: int, what: object, reason: str) -> None:
        self.dead.append((what, reason))

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.closed = True

    @property
    def starts(self) -> list[InferenceStarted]:
        return [record for record in self.records if isinstance(record, InferenceStarted)]

    @property
    def ends(self) -> list[InferenceEnded]:
        return [record for record in self.records if isinstance(record, InferenceEnded)]

    @property
    def feedback(self) -> list[Feedback]:
        return [record for record in self.records if isinstance(record, Feedback)]


class FakeLogStore:
    """Keeps stored records by what identifies them, so that storing twice changes nothing.

    `down` makes every call raise StoreUnavailable; a record for which `poison` is true is never taken.
    """

    def __init__(
        self, *, down: bool = False, poison: Callable[[LogRecord], bool] = lambda record: False
    ) -> None:
        self.down = down
        self.poison = poison
        self.batches: list[list[LogRecord]] = []
        self.dead_letters: list[tuple[object, str]] = []
        self.events: list[tuple[str, str, str, dict[str, Any]]] = []
        self.rows: dict[tuple[str, object], LogRecord] = {}

    async def store(self, records: Sequence[LogRecord]) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")
        for record in records:
            if self.poison(record):
                raise ValueError("this record will never be taken")
        self.batches.append(list(records))
        for record in records:
            identity = getattr(record, "id", None) or repr(record)
            self.rows.setdefault((type(record).__name__, identity), record)

    async def history(self) -> str:
        if self.down:
            raise StoreUnavailable("Postgres is down")
        return "one"

    async def add_dead_letter(self, what: object, reason: str) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")
        self.dead_letters.append((what, reason))

    async def note(self, kind: str, actor: str, subject: str, detail: Mapping[str, Any]) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")
        self.events.append((kind, actor, subject, dict(detail)))

    async def check(self) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")


class FakeLogReader:
    """The rows of a FakeLogStore, as a LogReader shows them; a page looks at `scanned` rows."""

    def __init__(self, store: FakeLogStore | None = None, *, scanned: int = 10_000) -> None:
        self.store = store or FakeLogStore()
        self.scanned = scanned

    async def get(self, inference_id: UUID, caller: str) -> LoggedInference | None:
        await self.store.check()
        row = next((row for row in self._rows() if row.id == inference_id), None)
        if row is None or (caller and row.caller != caller):
            return None
        said = [each for each in self._feedback() if each.inference_id == inference_id]
        said.sort(key=lambda each: (each.created_at, each.id), reverse=True)
        return replace(row, feedback=tuple(said[:20]))

    async def page(self, wanted: LogFilter, below: UUID | None, size: int) -> LogPage:
        await self.store.check()
        first, last = id_range(wanted)
        looked = [
            replace(row, request=None, answer=None)
            for row in self._rows()
            if first <= row.id <= last and (below is None or row.id < below)
        ]
        fitting = [row for row in looked[: self.scanned] if self._fits(wanted, row)]
        if not wanted.status and not wanted.model_version:  # what an index finds needs no looking
            fitting = [row for row in looked if self._fits(wanted, row)]
            return LogPage(fitting[:size], fitting[size - 1].id if len(fitting) > size else None)
        if len(fitting) > size:
            return LogPage(fitting[:size], fitting[size - 1].id)
        return LogPage(fitting, looked[self.scanned - 1].id if len(looked) >= self.scanned else None)

    @staticmethod
    def _fits(wanted: LogFilter, row: LoggedInference) -> bool:
        columns = ("caller", "session_id", "model_version", "status")
        return all(getattr(wanted, name) in ("", None, getattr(row, name)) for name in columns)

    def _feedback(self) -> list[Feedback]:
        return [record for record in self.store.rows.values() if isinstance(record, Feedback)]

    def _rows(self) -> list[LoggedInference]:
        ends = {
            record.id: record for record in self.store.rows.values() if isinstance(record, InferenceEnded)
        }
        starts = [record for record in self.store.rows.values() if isinstance(record, InferenceStarted)]
        rows = []
        for start in sorted(starts, key=lambda start: start.id, reverse=True):
            end = ends.get(start.id)
            rows.append(
                LoggedInference(
                    id=start.id,
                    caller=start.caller,
                    key_id=start.key_id,
                    alias=start.alias,
                    model_version=start.model_version,
                    target_role=start.target_role,
                    session_id=start.session_id,
                    status=Status.STARTED if end is None else end.status,
                    finish_reason=None if end is None else end.finish_reason,
                    error="" if end is None else end.error,
                    usage=Usage() if end is None else end.usage,
                    timings=Timings() if end is None else end.timings,
                    started_at=start.started_at,
                    ended_at=None if end is None else end.ended_at,
                    feedback_count=sum(each.inference_id == start.id for each in self._feedback()),
                    request=start.request,
                    answer=None if end is None else end.answer,
                )
            )
        return rows


class FakeLeaseStore:
    """The lease in a field."""

    def __init__(self, kept: KeptLease | None = None, *, down: bool = False) -> None:
        self.kept = kept
        self.down = down

    async def keep(self, lease: KeptLease) -> None:
        self._up()
        self.kept = lease

    async def find(self) -> KeptLease | None:
        self._up()
        return self.kept

    async def forget(self, lease_id: UUID) -> None:
        self._up()
        if self.kept is not None and self.kept.id == lease_id:
            self.kept = None

    def _up(self) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")


class FakeTokenStore:
    """Tokens in a dict. `hold` (an event) keeps each read waiting, as a database does that hangs."""

    def __init__(self, tokens: Iterable[TokenRecord] = (), *, down: bool = False) -> None:
        self.tokens = {token.key_id: token for token in tokens}
        self.down = down
        self.hold: asyncio.Event | None = None
        self.reads = 0

    async def all_tokens(self) -> list[TokenRecord]:
        if self.hold is not None:
            await self.hold.wait()
        self._up()
        self.reads += 1
        return list(self.tokens.values())

    async def create(self, token: TokenRecord, by: str = "") -> None:
        self._up()
        if token.key_id in self.tokens:
            raise AlreadyExists(f"key id {token.key_id} is taken")
        self.tokens[token.key_id] = token

    async def revoke(self, key_id: str, at: datetime, by: str = "") -> bool:
        self._up()
        token = self.tokens.get(key_id)
        if token is None or token.revoked_at is not None:
            return False
        self.tokens[key_id] = replace(token, revoked_at=at)
        return True

    async def limit(self, key_id: str, limits: Limits, by: str = "") -> bool:
        self._up()
        token = self.tokens.get(key_id)
        if token is None or token.revoked_at is not None:
            return False
        self.tokens[key_id] = replace(token, limits=limits)
        return True

    def _up(self) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")


def route_to(model_version: str = BASE, *, alias: str = "default", revision: int = 1) -> Route:
    """A route that leads wholly to one version."""
    return Route(alias, revision, (Target(model_version, TargetRole.STABLE, 100),))


class FakeRouteStore:
    """Routes in a dict, each change kept in `changes` as (route, changed_by)."""

    def __init__(self, routes: Iterable[Route] = (), *, down: bool = False) -> None:
        self.routes = {route.alias: route for route in routes}
        self.down = down
        self.changes: list[tuple[Route, str]] = []

    async def all_routes(self) -> list[Route]:
        self._up()
        return [self.routes[alias] for alias in sorted(self.routes)]

    async def set_route(self, route: Route, changed_by: str) -> Route:
        self._up()
        before = self.routes.get(route.alias)
        revision = 0 if before is None else before.revision
        if route.revision != revision:
            raise Conflict(
                f"route {route.alias} is at revision {revision}, not {route.revision}; read it again"
            )
        after = replace(route, revision=revision + 1)
        self.routes[route.alias] = after
        self.changes.append((after, changed_by))
        return after

    def _up(self) -> None:
        if self.down:
            raise StoreUnavailable("Postgres is down")


class FakeRoutes:
    """The routes in force, straight from a FakeRouteStore."""

    def __init__(self, store: FakeRouteStore | None = None) -> None:
        self.store = store or FakeRouteStore([route_to()])

    def get(self, alias: str) -> Route:
        try:
            return self.store.routes[alias]
        except KeyError:
            raise NotFound(f"there is no alias {alias}") from None

    def all(self) -> list[Route]:
        return [self.store.routes[alias] for alias in sorted(self.store.routes)]

    async def set(self, route: Route, changed_by: str) -> Route:
        return await self.store.set_route(route, changed_by)

    async def start(self) -> None:
        await self.store.all_routes()

    async def close(self) -> None:
        return None


class FakeSchemaProcess:
    """Checks schemas as the child process does, in this one; keeps what it was asked in `asked`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.closed = False

    async def ask(self, schema: str, answer: str | None = None) -> str:
        self.asked.append((schema, answer))
        return unholdable(schema) if answer is None else unfit(answer, schema)

    async def close(self) -> None:
        self.closed = True


ALL_SCOPES = frozenset(Scope)


class FakeAuthenticator:
    """Knows the tokens of `callers`; keeps what it was asked in `asked`."""

    def __init__(self, callers: dict[str, Caller] | None = None) -> None:
        self.callers = (
            callers if callers is not None else {"al_admin_token": Caller("admin", "admin", ALL_SCOPES)}
        )
        self.asked: list[str] = []

    async def authenticate(self, token: str) -> Caller:
        self.asked.append(token)
        try:
            return self.callers[token]
        except KeyError:
            raise Unauthenticated from None

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None
