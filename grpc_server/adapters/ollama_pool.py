"""Several Ollamas as one engine: each request goes to the one with the most room that has its model version.

A host that fails is passed over, for longer each time (`pool_host`); to write nothing, for anybody and for
long, is to fail. What a host failed at before its first token, another host answers. What is installed,
loaded or removed is so on every host that can be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from grpc_server.adapters import pool_host
from grpc_server.adapters.pool_host import Host, Standing
from grpc_server.domain.errors import ELSEWHERE, AgentLoopError, EngineUnavailable, NotFound
from grpc_server.domain.ports import Engine, Finished, Generation, Piece
from grpc_server.domain.rules import check_model_version
from grpc_server.domain.types import Embeddings, InstallProgress, ModelDetails, ModelVersion

CHECK_SECONDS = 2.0
CHECK_LIMIT_SECONDS = 5.0
"""A host whose list of models takes longer has failed its check."""
STALL_LOOK_SECONDS = 1.0
"""How soon it is looked again whether what has stalled can be asked of another."""
EJECTED_SHARE = 0.5
"""At most this share of the hosts is ejected at once: if all fail, it is not the hosts."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class OllamaPool:
    """An `Engine` over `engines`, by their names for operators (URLs). It closes them at its end."""

    name = "ollama"

    def __init__(
        self, engines: Mapping[str, Engine], *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.hosts = [Host(name, engine, monotonic) for name, engine in engines.items()]
        self._order = itertools.count(1)
        self._checks: list[asyncio.Task[None]] = []

    @property
    def parallel(self) -> int:
        """What all hosts run at once together."""
        return sum(host.engine.parallel for host in self.hosts)

    async def __aenter__(self) -> OllamaPool:
        await self._look()
        self._checks = [asyncio.create_task(self._keep_checking(host)) for host in self.hosts]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def standings(self) -> dict[str, int]:
        """How many hosts are `well`, `ejected` and `down`."""
        found = [host.standing for host in self.hosts]
        return {standing.name.lower(): found.count(standing) for standing in Standing}

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        """See `Engine.generate`. Another host is asked where one fails before its first token."""
        tried: list[Host] = []
        while True:
            host = await self._choose(generation.model_version, tried)
            begun = False
            try:
                with self._asking(host):
                    async with aclosing(host.engine.generate(generation)) as events:
                        event = await self._first(host, events, generation.model_version, tried)
                        while event is not None:
                            begun = True
                            host.heard()
                            if isinstance(event, Finished):
                                host.answered()
                            yield event
                            event = await anext(events, None)
                return
            except ELSEWHERE as error:
                self._blame(host, generation.model_version, error, begun=begun)
                if begun or not self._having(generation.model_version, tried):
                    raise

    async def embed(self, model_version: str, texts: Sequence[str]) -> Embeddings:
        """See `Engine.embed`."""
        return await self._call(model_version, lambda engine: engine.embed(model_version, texts))

    async def count_tokens(self, model_version: str, prompt: str) -> int:
        """See `Engine.count_tokens`."""
        return await self._call(model_version, lambda engine: engine.count_tokens(model_version, prompt))

    async def list_models(self) -> list[ModelVersion]:
        """See `Engine.list_models`: what any host has; loaded is what all who have it have loaded.

        One that another host has under the same name with other bytes is left out: it is never asked for it.
        """
        answering = await self._look()
        if not answering:
            raise EngineUnavailable(f"none of the {len(self.hosts)} Ollamas answers; try again")
        names = sorted({name for host in answering for name in host.models})
        merged = []
        for name in names:
            having = [host.models[name] for host in self._having(name) if host in answering]
            if having:
                merged.append(replace(having[0], loaded=all(model.loaded for model in having)))
        return merged

    async def load(self, model_version: str) -> None:
        """See `Engine.load`: on every host that has it and can be reached."""
        await self._on_all(await self._holders(model_version), lambda engine: engine.load(model_version))

    async def unload(self, model_version: str) -> None:
        """See `Engine.unload`: on every host that has it and can be reached."""
        await self._on_all(await self._holders(model_version), lambda engine: engine.unload(model_version))

    async def show(self, model_version: str) -> ModelDetails:
        """See `Engine.show`."""
        return await self._call(model_version, lambda engine: engine.show(model_version), works=False)

    async def install(
        self, name: str, path: Path, sha256: str, progress: InstallProgress | None = None
    ) -> bool:
        """See `Engine.install`: on every host that can be reached, one after another.

        A host that cannot be is passed over: install again when it is back, which changes nothing elsewhere.
        """
        progress = progress or InstallProgress()
        progress.hosts, turn, number = len(self.hosts), asyncio.Lock(), itertools.count(1)

        async def install(engine: Engine) -> bool:
            async with turn:
                progress.host = next(number)
                return await engine.install(name, path, sha256, progress)

        changed = await self._on_all(self.hosts, install)
        await self._look()
        return any(changed)

    async def remove(self, name: str) -> bool:
        """See `Engine.remove`. Raises EngineUnavailable where a host still has it, as it is not reached."""
        changed = await self._on_all(self.hosts, lambda engine: engine.remove(name), all_of_them=True)
        await self._look()
        return any(changed)

    async def shrink(self, context_tokens: int) -> None:
        """See `Engine.shrink`: every host that can be reached."""
        await self._on_all(self.hosts, lambda engine: engine.shrink(context_tokens))

    async def grow(self) -> None:
        """See `Engine.grow`: every host that can be reached."""
        await self._on_all(self.hosts, lambda engine: engine.grow())

    async def check(self) -> None:
        """See `Engine.check`: one host that answers is enough."""
        await self._on_all(self.hosts, lambda engine: engine.check(), quiet=True)

    async def close(self) -> None:
        """See `Engine.close`."""
        for task in self._checks:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await asyncio.gather(*(host.engine.close() for host in self.hosts))

    async def _first(
        self,
        host: Host,
        events: AsyncGenerator[Piece | Finished, None],
        model_version: str,
        tried: Sequence[Host],
    ) -> Piece | Finished | None:
        """The first event; None if there is none.

        Raises EngineUnavailable where the host has stalled, once another one that is well can be asked.
        """
        loop, asked_at, limit = asyncio.get_running_loop(), host.now(), asyncio.timeout(None)
        timer = loop.call_later(pool_host.STALLED_SECONDS, lambda: look())

        def look() -> None:
            nonlocal timer
            left = pool_host.STALLED_SECONDS - host.silent_seconds(asked_at)
            others = [one for one in self._having(model_version, tried) if one.standing is Standing.WELL]
            if left <= 0 and others:
                limit.reschedule(loop.time())
            else:
                timer = loop.call_later(max(left, STALL_LOOK_SECONDS), look)

        try:
            async with limit:
                return await anext(events, None)
        except TimeoutError as error:
            if not limit.expired():
                raise
            silent = f"an Ollama has written nothing for {pool_host.STALLED_SECONDS:g} s"
            raise EngineUnavailable(f"{silent}; try again") from error
        except asyncio.CancelledError:
            if host.is_given_up(asked_at):
                self._failed(host)
            raise
        finally:
            timer.cancel()

    async def _call(
        self, model_version: str, ask: Callable[[Engine], Awaitable[Result]], *, works: bool = True
    ) -> Result:
        """`works`: whether the host's runner has a hand in it, or it only reads a file."""
        tried: list[Host] = []
        while True:
            host = await self._choose(model_version, tried)
            try:
                with self._asking(host):
                    result = await ask(host.engine)
            except ELSEWHERE as error:
                self._blame(host, model_version, error)
                if not self._having(model_version, tried):
                    raise
            else:
                if works:
                    host.heard()
                    host.answered()
                return result

    async def _choose(self, model_version: str, tried: list[Host]) -> Host:
        """The best host not tried yet, now tried. Raises InvalidArgument, NotFound, EngineUnavailable."""
        check_model_version(model_version)
        having = self._having(model_version, tried)
        if not having:  # perhaps it was installed on a host since its last check
            await self._holders(model_version)
            having = self._having(model_version, tried)
        if not having:
            raise NotFound(f"model version {model_version} is not installed on any Ollama")
        host = min(having, key=lambda host: (host.standing, host.load, host.asked_last))
        host.asked_last = next(self._order)
        tried.append(host)
        return host

    def _having(self, model_version: str, tried: Sequence[Host] = ()) -> list[Host]:
        """Who has it, and was not tried; with other bytes than the first of them is not having it."""
        having = [host for host in self.hosts if model_version in host.models]
        sha256 = having[0].models[model_version].sha256 if having else ""
        same = [host for host in having if host.models[model_version].sha256 == sha256]
        return [host for host in same if host not in tried]

    async def _holders(self, model_version: str) -> list[Host]:
        check_model_version(model_version)
        answering = await self._look()
        holders = self._having(model_version)
        if not holders and not answering:
            raise EngineUnavailable(f"none of the {len(self.hosts)} Ollamas answers; try again")
        if not holders:
            raise NotFound(f"model version {model_version} is not installed on any Ollama")
        return holders

    @contextlib.contextmanager
    def _asking(self, host: Host) -> Iterator[None]:
        host.in_flight += 1
        try:
            yield
        finally:
            host.in_flight -= 1

    def _blame(self, host: Host, model_version: str, error: AgentLoopError, *, begun: bool = False) -> None:
        """What a failure says of its host. An answer that does not fit its schema is not the host's fault."""
        if isinstance(error, NotFound):
            host.models.pop(model_version, None)  # removed behind our back
        elif not begun or isinstance(error, EngineUnavailable):
            self._failed(host)

    def _failed(self, host: Host) -> None:
        ejected = sum(other.standing is Standing.EJECTED for other in self.hosts)
        host.failed(may_be_ejected=ejected + 1 <= len(self.hosts) * EJECTED_SHARE)

    async def _on_all(
        self,
        hosts: Sequence[Host],
        work: Callable[[Engine], Awaitable[Result]],
        *,
        all_of_them: bool = False,
        quiet: bool = False,
    ) -> list[Result]:
        """What those give that can be reached. Raises what any other error is, and if nobody is reached."""
        done: list[Result] = []
        unreached: dict[str, EngineUnavailable] = {}

        async def one(host: Host) -> None:
            try:
                done.append(await work(host.engine))
            except EngineUnavailable as error:
                unreached[host.name] = error

        found = await asyncio.gather(*(one(host) for host in hosts), return_exceptions=True)
        for error in found:
            if error is not None:
                raise error
        if unreached and not done:
            raise next(iter(unreached.values()))
        if unreached and all_of_them:
            raise EngineUnavailable(f"not done on {', '.join(unreached)}, which is out of reach; try again")
        if unreached and not quiet:
            log.warning("some engines were out of reach", extra={"hosts": sorted(unreached)})
        return done

    async def _look(self) -> list[Host]:
        """Check all hosts now; those that answer."""
        found = await asyncio.gather(*(self._check(host) for host in self.hosts))
        return [host for host, answers in zip(self.hosts, found, strict=True) if answers]

    async def _keep_checking(self, host: Host) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self._check(host)

    async def _check(self, host: Host) -> bool:
        try:
            async with asyncio.timeout(CHECK_LIMIT_SECONDS):
                models = await host.engine.list_models()
        except (AgentLoopError, TimeoutError):
            host.unseen()
            return False
        except Exception:  # whatever it was, the next check may pass
            log.exception("the check of an engine failed", extra={"host": host.name})
            host.unseen()
            return False
        host.seen(models)
        return True
