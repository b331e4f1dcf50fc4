"""The embedded engine: llama.cpp (PyPI `xllamacpp`), each loaded model version in a child process of its own.

A version is loaded when it is first asked. Its child is started anew, after a pause that doubles, when it
dies; what it was generating fails with EngineUnavailable, and neither the server nor another version notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from grpc_server.adapters.embedded_child import ChildOptions
from grpc_server.adapters.embedded_process import ChildProcess, Supervisor
from grpc_server.adapters.gguf_file import checked_copy, in_thread, name_taken, writing
from grpc_server.adapters.gguf_header import read_details
from grpc_server.adapters.http_errors import translated
from grpc_server.adapters.http_lines import lines
from grpc_server.adapters.json_schema import Schemas, laid_out
from grpc_server.domain.errors import (
    AgentLoopError,
    EngineFailed,
    EngineUnavailable,
    InvalidArgument,
    NotFound,
    PromptTooLong,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.rules import check_model_version
from grpc_server.domain.types import (
    Embeddings,
    FinishReason,
    InstallProgress,
    ModelDetails,
    ModelVersion,
    Usage,
)

Answer = TypeVar("Answer")

_PARTIAL = ".partial"
_TOO_LARGE = re.compile(r"\((\d+) tokens\) is too large to process.*batch size: (\d+)", re.DOTALL)
"""What llama.cpp says of a text to be embedded that is longer than its batch, which is our context."""
_FINISH = {"eos": FinishReason.STOP, "word": FinishReason.STOP, "limit": FinishReason.LENGTH}


class EmbeddedEngine:
    """An `Engine` whose versions lie as files in `models_dir`, each beside a JSON file with its SHA-256.

    Each loaded version has `parallel` slots of `context_tokens`; `threads` 0 means every core we may use.
    """

    name = "embedded"

    def __init__(
        self,
        models_dir: Path,
        *,
        context_tokens: int = 4096,
        parallel: int = 4,
        threads: int = 0,
        schemas: Schemas | None = None,
    ) -> None:
        self.models_dir = models_dir.resolve()
        self.context_tokens = context_tokens
        self.parallel = parallel
        self.threads = threads or len(os.sched_getaffinity(0))
        self._schemas = schemas or Schemas()
        self._supervisors: dict[tuple[str, bool], Supervisor] = {}
        self._installing = asyncio.Lock()
        self._details: dict[str, ModelDetails] = {}  # of installed versions
        self._closed = False
        self._small: int | None = None  # the context while the GPU is lent

    async def __aenter__(self) -> EmbeddedEngine:
        await asyncio.to_thread(self._remove_stale)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        """See `Engine.generate`."""
        body = _completion(generation)
        if generation.json_schema is not None:
            body["json_schema"] = laid_out(await self._schemas.checked(generation.json_schema))
        child = await self._child(generation.model_version)
        async with (
            _errors(child),
            child.client.streamed("/completion", body) as response,
            contextlib.aclosing(lines(response)) as answer,
        ):
            if response.status_code != 200:
                raise _refusal(response.status_code, await response.aread())
            async for there in answer:
                piece, last, wrong = _read(there)
                if piece is not None:
                    yield piece
                if wrong is not None:
                    raise wrong
                if last is not None:
                    yield _finished(last)
                    return
        raise EngineUnavailable("the embedded engine's stream ended before the answer did")

    async def embed(self, model_version: str, texts: Sequence[str]) -> Embeddings:
        """See `Engine.embed`. The mean over a text's tokens, of length 1."""
        if not texts:
            return Embeddings((), 0)
        child = await self._child(model_version, embedding=True)
        return await self._post(child, "/v1/embeddings", {"input": list(texts)}, _embeddings)

    async def count_tokens(self, model_version: str, prompt: str) -> int:
        """See `Engine.count_tokens`. llama.cpp's tokenizer is asked; nothing is read by the model."""
        if not prompt:
            raise InvalidArgument("the prompt is empty", "messages")
        child = await self._child(model_version)
        body = {"content": prompt, "add_special": True, "parse_special": True}
        return await self._post(child, "/tokenize", body, lambda answer: len(answer["tokens"]))

    async def list_models(self) -> list[ModelVersion]:
        """See `Engine.list_models`."""
        versions = []
        for sidecar in self.models_dir.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                about = json.loads(sidecar.read_text())
                supervisor = self._supervisors.get((about["name"], False))
                loaded = supervisor is not None and supervisor.ready
                versions.append(ModelVersion(about["name"], about["sha256"], about["size_bytes"], loaded))
        return sorted(versions, key=lambda version: version.name)

    async def load(self, model_version: str) -> None:
        """See `Engine.load`."""
        await self._child(model_version)

    async def unload(self, model_version: str) -> None:
        """See `Engine.unload`. What it is generating ends with EngineUnavailable."""
        self._installed(model_version)
        await self._stop(model_version)

    async def show(self, model_version: str) -> ModelDetails:
        """See `Engine.show`. A file never changes, so its header is read once."""
        self._installed(model_version)
        if model_version not in self._details:
            self._details[model_version] = await asyncio.to_thread(read_details, self._gguf(model_version))
        return self._details[model_version]

    async def install(
        self, name: str, path: Path, sha256: str, progress: InstallProgress | None = None
    ) -> bool:
        """See `Engine.install`. The file is copied, so that the version stays whatever happens to `path`."""
        check_model_version(name, "name")
        async with self._installing:
            if about := self._about(name):
                if about["sha256"] == sha256.lower():
                    return False
                await in_thread(lambda abandoned: checked_copy(path, sha256, abandoned=abandoned))
                raise name_taken(name, about["sha256"])
            await in_thread(lambda abandoned: self._copy_in(name, path, sha256.lower(), abandoned, progress))
            return True

    async def remove(self, name: str) -> bool:
        """See `Engine.remove`."""
        check_model_version(name, "name")
        async with self._installing:
            there = self._about(name) is not None
            self._details.pop(name, None)
            self._sidecar(name).unlink(missing_ok=True)  # so that nobody starts another child meanwhile
            await self._stop(name)
            self._gguf(name).unlink(missing_ok=True)
            return there

    async def shrink(self, context_tokens: int) -> None:
        """See `Engine.shrink`. What is being generated ends with EngineUnavailable."""
        self._small = min(context_tokens, self.context_tokens)
        await self._stop_all()

    async def grow(self) -> None:
        """See `Engine.grow`. What is being generated ends with EngineUnavailable."""
        self._small = None
        await self._stop_all()

    async def check(self) -> None:
        """See `Engine.check`: every loaded version's child must answer; none need be loaded."""
        if self._closed:
            raise EngineUnavailable("the embedded engine is closed")
        for (name, _), supervisor in list(self._supervisors.items()):
            if supervisor.down:
                raise EngineUnavailable(f"the embedded engine of {name} died; it is being started anew")
            if not supervisor.ready:
                continue  # loading for the first time
            child = await supervisor.child()
            async with _errors(child):
                response = await child.client.get("/health", timeout=5.0)
                if response.status_code != 200:
                    raise EngineUnavailable(f"the embedded engine's health is {response.status_code}")

    async def close(self) -> None:
        """See `Engine.close`. No child is left when it returns."""
        self._closed = True
        await asyncio.gather(self._schemas.close(), self._stop_all())

    async def _stop_all(self) -> None:
        supervisors, self._supervisors = list(self._supervisors.values()), {}
        await asyncio.gather(*(supervisor.close() for supervisor in supervisors))

    async def _post(
        self, child: ChildProcess, path: str, body: dict[str, Any], read: Callable[[Any], Answer]
    ) -> Answer:
        """What `read` makes of llama.cpp's JSON; in a thread, as a million numbers take a while."""
        async with _errors(child):
            response = await child.client.post(path, json=body)
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        try:
            return await asyncio.to_thread(lambda: read(json.loads(response.content)))
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFailed("the embedded engine answered something that is not its JSON") from error

    async def _child(self, model_version: str, *, embedding: bool = False) -> ChildProcess:
        if self._closed:
            raise EngineUnavailable("the embedded engine is closed")
        self._installed(model_version)
        key = (model_version, embedding)
        if key not in self._supervisors:
            options = ChildOptions(
                model=str(self._gguf(model_version)),
                key=secrets.token_urlsafe(32),
                context_tokens=self._small or self.context_tokens,
                parallel=1 if embedding else self.parallel,
                threads=self.threads,
                embedding=embedding,
                on_gpu=self._small is None,
            )
            self._supervisors[key] = Supervisor(model_version, options)
        supervisor = self._supervisors[key]
        try:
            return await supervisor.child()
        except EngineFailed:  # it never ran: the next call may try anew, with a file that was mended
            if self._supervisors.get(key) is supervisor:
                del self._supervisors[key]
            await supervisor.close()
            raise

    async def _stop(self, name: str) -> None:
        for embedding in (False, True):
            if supervisor := self._supervisors.pop((name, embedding), None):
                await supervisor.close()

    def _installed(self, name: str) -> None:
        check_model_version(name)
        if self._about(name) is None:
            raise NotFound(f"model version {name} is not installed on this engine")

    def _about(self, name: str) -> dict[str, Any] | None:
        try:
            about: dict[str, Any] = json.loads(self._sidecar(name).read_text())
        except FileNotFoundError:
            return None
        return about

    def _gguf(self, name: str) -> Path:
        return self.models_dir / f"{name.replace(':', '@')}.gguf"

    def _sidecar(self, name: str) -> Path:
        return self.models_dir / f"{name.replace(':', '@')}.json"

    def _copy_in(
        self,
        name: str,
        path: Path,
        sha256: str,
        abandoned: threading.Event,
        progress: InstallProgress | None,
    ) -> None:
        """Both files appear by atomic rename, the sidecar last: only a version that has one is installed."""
        with writing(self.models_dir), self._partials() as (gguf, sidecar):
            size = checked_copy(path, sha256, gguf, abandoned, progress)
            about = {"name": name, "sha256": sha256, "size_bytes": size, "installed_at": int(time.time())}
            sidecar.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
            _sync(gguf)
            _sync(sidecar)
            gguf.replace(self._gguf(name))
            sidecar.replace(self._sidecar(name))
            _sync(self.models_dir)

    @contextlib.contextmanager
    def _partials(self) -> Iterator[tuple[Path, Path]]:
        """Where the two files of one attempt grow; nothing is left there when it ends."""
        self.models_dir.mkdir(parents=True, exist_ok=True)
        attempt = secrets.token_hex(8)
        files = self.models_dir / f"{attempt}.gguf{_PARTIAL}", self.models_dir / f"{attempt}.json{_PARTIAL}"
        try:
            yield files
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Delete what attempts left that ended with their process; it only takes room."""
        for partial in self.models_dir.glob(f"*{_PARTIAL}"):
            with contextlib.suppress(OSError):
                partial.unlink()


def _embeddings(answer: Any) -> Embeddings:
    items = sorted(answer["data"], key=lambda item: item["index"])
    vectors = tuple(tuple(item["embedding"]) for item in items)
    return Embeddings(vectors, int(answer["usage"]["prompt_tokens"]))


def _completion(generation: Generation) -> dict[str, Any]:
    """The body of llama.cpp's POST /completion, without a schema; what callers cannot set is as on Ollama."""
    if not generation.prompt:
        raise InvalidArgument("the prompt is empty", "messages")
    sampling = generation.sampling
    return {
        "prompt": generation.prompt,
        "stream": True,
        "cache_prompt": True,
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "seed": -1 if sampling.seed is None else sampling.seed & 0xFFFFFFFF,
        "stop": list(dict.fromkeys((*generation.stop, *sampling.stop))),
    }


def _read(
    there: Sequence[bytes],
) -> tuple[Piece | None, dict[str, Any] | None, AgentLoopError | None]:
    """What lines of a stream say: their text, and what ends them: a last word, or a fault."""
    texts: list[str] = []
    usage: Usage | None = None
    last: dict[str, Any] | None = None
    wrong: AgentLoopError | None = None
    try:
        for line in there:
            event = _event(line)
            if event is None:
                continue
            text = event.get("content") or ""
            if not isinstance(text, str):
                raise EngineFailed("the embedded engine answered with a token that is no text")
            if text:
                texts.append(text)
                usage = _so_far(event)
            if event.get("stop"):
                last = event
                break
    except AgentLoopError as error:
        wrong = error
    return (Piece("".join(texts), usage, len(texts)) if texts else None), last, wrong


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON of a server-sent event; None for a line that is a comment (a ping)."""
    kind, _, data = line.partition(b": ")
    if kind not in (b"data", b"error"):
        return None
    try:
        event = from_json(data, cache_strings="keys")
        if isinstance(event, dict):
            if "error" in event:
                raise _refusal(int(event["error"].get("code", 500)), data)
            return event
    except (ValueError, AttributeError, TypeError) as error:
        raise EngineFailed("the embedded engine streamed something that is not its JSON") from error
    raise EngineFailed("the embedded engine streamed something that is not its JSON")


def _usage(event: dict[str, Any]) -> Usage:
    return Usage(int(event["tokens_evaluated"]), int(event["tokens_predicted"]))


def _so_far(event: dict[str, Any]) -> Usage | None:
    """What a piece says of the tokens before it; that it says so is llama.cpp's habit, not its promise."""
    try:
        return _usage(event)
    except (KeyError, TypeError, ValueError):
        return None


def _finished(event: dict[str, Any]) -> Finished:
    try:
        return Finished(_FINISH[event["stop_type"]], _usage(event))
    except (KeyError, TypeError, ValueError) as error:
        raise EngineFailed("the embedded engine's last word lacks its reason or its token counts") from error


def _refusal(status: int, body: bytes) -> AgentLoopError:
    """What an error answer of llama.cpp's server means. Its text may quote the request: it is dropped.

    Its types of errors: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/server-common.cpp
    """
    try:
        error = json.loads(body)["error"]
        kind = str(error.get("type", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        error, kind = {}, ""
    if kind == "exceed_context_size_error":
        return PromptTooLong.by(error.get("n_prompt_tokens"), error.get("n_ctx"))
    if found := _TOO_LARGE.search(str(error.get("message", ""))):
        return PromptTooLong.by(int(found[1]), int(found[2]))
    if status == 400 or kind == "invalid_request_error":
        return InvalidArgument("the embedded engine cannot do what this request asks")
    if status == 503 or kind == "unavailable_error":
        return EngineUnavailable("the embedded engine is still loading; try again")
    return EngineFailed(f"the embedded engine answered with status {status}")


def _errors(child: ChildProcess) -> contextlib.AbstractAsyncContextManager[None]:
    async def describe(error: Exception) -> str:
        await child.settle()  # so that the next caller finds the next child, and the text is true
        state = type(error).__name__ if child.alive else "its process died"
        return f"the embedded engine broke off ({state}); try again"

    return translated(describe)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
