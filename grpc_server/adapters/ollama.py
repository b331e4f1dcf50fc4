"""The Ollama engine: raw prompts over its HTTP API (https://docs.ollama.com/api).

Its own Python client has no time limits and leaves the errors of a broken stream unmapped. A change of
`num_ctx`, `num_batch` or `shift` makes Ollama load a model anew, so they are the same in every request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic_core import from_json

from grpc_server.adapters.gguf_file import checked_copy, in_thread, name_taken, opened
from grpc_server.adapters.http_client import http_client
from grpc_server.adapters.http_errors import translated
from grpc_server.adapters.http_lines import lines, refusal
from grpc_server.adapters.json_schema import Schemas
from grpc_server.domain.errors import (
    AgentLoopError,
    EngineFailed,
    EngineUnavailable,
    Exhausted,
    InvalidArgument,
    NotFound,
    Precondition,
    PromptTooLong,
)
from grpc_server.domain.ports import Finished, Generation, Piece
from grpc_server.domain.rules import check_model_version
from grpc_server.domain.types import (
    Embeddings,
    FinishReason,
    InstallPhase,
    InstallProgress,
    ModelDetails,
    ModelVersion,
    Usage,
)

_TIMEOUT = httpx.Timeout(connect=5.0, write=60.0, read=600.0, pool=5.0)
"""Reading waits for a model to load, a place, and the prompt; as a rule the caller's deadline comes first."""

_NUM_BATCH = 512
_KEEP = -1
_REPEATS = 30
"""Ollama ends a stream, without a last word, when a model says the same more often than this (0.34)."""

_MOST_TOKENS = 2**31 - 1
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_INSTALLED = "GGUF installed by agent-loop-service, sha256:"
_SHA256 = (
    # Ollama makes a copy of a GGUF, in its own layout of metadata, so what we installed is noted beside it;
    re.compile(rf"^{_INSTALLED}([0-9a-f]{{64}})$", re.MULTILINE),
    # of what others installed, its copy is all there is.
    re.compile(r"^FROM .*sha256[-:]([0-9a-f]{64})$", re.MULTILINE),
)
_DISK_FULL = ("no space left on device", "disk quota exceeded")  # Go's words for ENOSPC and EDQUOT
_MEMORY_FULL = ("requires more system memory", "out of memory", "unable to allocate")
_RUNNER_DIED = ("runner", "running the model", "llama-server", "EOF", "connection re", "broken pipe")


class OllamaEngine:
    """An `Engine` at `url`, an Ollama ≥ 0.34 whose OLLAMA_NUM_PARALLEL is `parallel`."""

    name = "ollama"

    def __init__(
        self,
        url: str,
        *,
        context_tokens: int = 4096,
        parallel: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
        schemas: Schemas | None = None,
    ) -> None:
        self.context_tokens = context_tokens
        self.parallel = parallel
        self._schemas = schemas or Schemas()
        self._small: int | None = None  # the context while the GPU is lent
        self._installing = asyncio.Lock()
        self._digests: dict[str, str] = {}  # of a manifest -> the GGUF's SHA-256; neither ever changes
        self._client = http_client(url if "://" in url else f"http://{url}", _TIMEOUT, transport=transport)

    async def __aenter__(self) -> OllamaEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece | Finished, None]:
        """See `Engine.generate`."""
        body = self._generate_body(generation)
        if generation.json_schema is not None:
            body["format"] = await self._schemas.checked(generation.json_schema)
        pieces: list[str] = []
        async with (
            translated(_describe),
            self._client.streamed("/api/generate", body) as response,
            contextlib.aclosing(lines(response)) as answer,
        ):
            if response.status_code != 200:
                raise _refusal(response.status_code, await refusal(response))
            async for there in answer:
                texts, last, wrong = _read(there, generation.sampling.max_tokens - len(pieces))
                pieces += texts
                if texts:
                    yield Piece("".join(texts), tokens=len(texts))
                if wrong is not None:
                    raise wrong
                if last is not None:
                    finished = _finished(last)
                    if generation.json_schema is not None and finished.finish_reason is FinishReason.STOP:
                        await self._schemas.check_answer("".join(pieces), generation.json_schema)
                    yield finished
                    return
        if not _repeats(pieces):
            raise EngineUnavailable("Ollama's stream ended before the answer did")
        # It was Ollama that stopped a model which repeats itself. To us that is an answer cut off; the
        # prompt, which Ollama still holds, is counted by asking for one more token.
        last = await self._ask({**body, "stream": False, "options": {**body["options"], "num_predict": 1}})
        yield Finished(FinishReason.LENGTH, Usage(_finished(last).usage.input_tokens, len(pieces) + 1))

    async def embed(self, model_version: str, texts: Sequence[str]) -> Embeddings:
        """See `Engine.embed`. Raises Precondition for a version that Ollama does not make vectors with."""
        check_model_version(model_version)
        if not texts:
            return Embeddings((), 0)
        shown = await self._post("/api/show", {"model": model_version})
        if "embedding" not in shown.get("capabilities", []):  # to ask all the same would load it anew
            raise Precondition(f"Ollama makes no vectors with model version {model_version}")
        body = {
            "model": model_version,
            "input": list(texts),
            "options": self._pinned(),
            "keep_alive": _KEEP,
            "truncate": False,
        }
        answer = await self._post("/api/embed", body)
        vectors = tuple(tuple(float(number) for number in vector) for vector in answer["embeddings"])
        return Embeddings(vectors, int(answer.get("prompt_eval_count", 0)))

    async def count_tokens(self, model_version: str, prompt: str) -> int:
        """See `Engine.count_tokens`. Ollama shows no tokenizer: it reads the prompt, and writes a token.

        What it holds of the prompt already it does not read again; what is longer than the context it refuses
        unread, with its count.
        """
        check_model_version(model_version)
        if not prompt:
            raise InvalidArgument("the prompt is empty", "messages")
        body = self._request(model_version, prompt)
        body["options"] |= {"num_predict": 1}
        try:
            return _finished(await self._ask(body)).usage.input_tokens
        except PromptTooLong as error:
            if error.tokens is None:
                raise
            return error.tokens

    async def list_models(self) -> list[ModelVersion]:
        """See `Engine.list_models`. `size_bytes` counts Ollama's few hundred bytes about the GGUF too."""
        tags, running = await asyncio.gather(self._get("/api/tags"), self._get("/api/ps"))
        loaded = {model["name"] for model in running["models"]}
        versions = []
        for model in tags["models"]:
            if model["details"]["format"] != "gguf":
                continue  # another user's of the same Ollama
            with contextlib.suppress(NotFound):  # removed meanwhile
                sha256 = await self._sha256(model["name"], model["digest"])
                versions.append(ModelVersion(model["name"], sha256, model["size"], model["name"] in loaded))
        return sorted(versions, key=lambda version: version.name)

    async def load(self, model_version: str) -> None:
        """See `Engine.load`."""
        check_model_version(model_version)
        await self._ask(self._request(model_version))

    async def unload(self, model_version: str) -> None:
        """See `Engine.unload`. What it is generating goes on to its end."""
        check_model_version(model_version)
        await self._ask({"model": model_version, "keep_alive": 0, "stream": False})
        give_up = time.monotonic() + 5
        while time.monotonic() < give_up:
            running = await self._get("/api/ps")
            if model_version not in [model["name"] for model in running["models"]]:
                return
            await asyncio.sleep(0.05)

    async def show(self, model_version: str) -> ModelDetails:
        """See `Engine.show`: as Ollama has read it from the file's header."""
        check_model_version(model_version)
        shown = await self._post("/api/show", {"model": model_version})
        try:
            about = shown["model_info"]
            architecture = str(about.get("general.architecture", ""))
            return ModelDetails(
                architecture,
                int(about.get("general.parameter_count", 0)),
                str(shown["details"].get("quantization_level", "")),
                int(about.get(f"{architecture}.context_length", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineFailed(f"Ollama does not tell what {model_version} is") from error

    async def install(
        self, name: str, path: Path, sha256: str, progress: InstallProgress | None = None
    ) -> bool:
        """See `Engine.install`."""
        check_model_version(name, "name")
        sha256 = sha256.lower()
        async with self._installing:
            try:
                installed = await self._shown_sha256(name)
            except NotFound:
                installed = ""
            if installed == sha256:
                return False
            progress = progress or InstallProgress()
            await in_thread(
                lambda abandoned: checked_copy(path, sha256, abandoned=abandoned, progress=progress)
            )
            if installed:
                raise name_taken(name, installed)
            progress.begin(InstallPhase.COPYING, progress.total_bytes)
            await self._upload(path, sha256, progress)
            files = {"model.gguf": f"sha256:{sha256}"}
            body = {"model": name, "files": files, "license": f"{_INSTALLED}{sha256}", "stream": False}
            try:
                await self._post("/api/create", body)
            except (InvalidArgument, EngineFailed) as error:
                raise Precondition(f"Ollama cannot make a model version of {path}: {error}") from error
            return True

    async def remove(self, name: str) -> bool:
        """See `Engine.remove`."""
        check_model_version(name, "name")
        async with self._installing:
            try:
                await self.unload(name)
                await self._call("DELETE", "/api/delete", json={"model": name})
            except NotFound:
                return False
            return True

    async def shrink(self, context_tokens: int) -> None:
        """See `Engine.shrink`: with `num_gpu` 0 Ollama keeps a model's layers on the processor."""
        self._small = min(context_tokens, self.context_tokens)
        await self._unload_all()

    async def grow(self) -> None:
        """See `Engine.grow`."""
        self._small = None
        await self._unload_all()

    async def _unload_all(self) -> None:
        running = await self._get("/api/ps")
        for model in running["models"]:
            await self.unload(model["name"])

    async def check(self) -> None:
        """See `Engine.check`."""
        await self._call("GET", "/api/version", timeout=5.0)

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.gather(self._client.aclose(), self._schemas.close())

    def _pinned(self) -> dict[str, Any]:
        if self._small is not None:
            return {"num_ctx": self._small, "num_batch": _NUM_BATCH, "num_gpu": 0}
        return {"num_ctx": self.context_tokens, "num_batch": _NUM_BATCH}

    def _request(self, model_version: str, prompt: str = "") -> dict[str, Any]:
        """What every request for tokens has; with an empty prompt it only loads the model."""
        return {
            "model": model_version,
            "prompt": prompt,
            "raw": True,
            "stream": False,
            "keep_alive": _KEEP,
            "shift": False,  # a full context ends the answer; it never forgets the beginning
            "truncate": False,
            "options": self._pinned(),
        }

    def _generate_body(self, generation: Generation) -> dict[str, Any]:
        check_model_version(generation.model_version)
        if not generation.prompt:
            raise InvalidArgument("the prompt is empty", "messages")
        sampling = generation.sampling
        body = self._request(generation.model_version, generation.prompt)
        body["stream"] = True
        body["options"] |= {
            "num_predict": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "seed": -1 if sampling.seed is None else sampling.seed & 0xFFFFFFFF,
            "stop": list(dict.fromkeys((*generation.stop, *sampling.stop))),
        }
        return body

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._post("/api/generate", body)

    async def _get(self, path: str) -> dict[str, Any]:
        return _json(await self._call("GET", path))

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return _json(await self._call("POST", path, json=body))

    async def _call(self, method: str, path: str, **request: Any) -> bytes:
        async with translated(_describe):
            response = await self._client.request(method, path, **request)
        if response.status_code >= 300:
            raise _refusal(response.status_code, response.content)
        return response.content

    async def _sha256(self, name: str, manifest: str) -> str:
        if manifest not in self._digests:
            self._digests[manifest] = await self._shown_sha256(name)
        return self._digests[manifest]

    async def _shown_sha256(self, name: str) -> str:
        """Of the version's GGUF: from its license, where we noted it, or from its Modelfile."""
        shown = await self._post("/api/show", {"model": name})
        text = f"{shown.get('license', '')}\n{shown.get('modelfile', '')}"
        for pattern in _SHA256:
            if match := pattern.search(text):
                return match[1]
        raise EngineFailed(f"Ollama does not tell the SHA-256 of {name}; is it no local GGUF?")

    async def _upload(self, path: Path, sha256: str, progress: InstallProgress) -> None:
        blob = f"/api/blobs/sha256:{sha256}"
        try:
            await self._call("HEAD", blob)
        except NotFound:
            try:
                await self._call("POST", blob, content=_chunks(path, progress))
            except InvalidArgument as error:
                raise Precondition(f"{path} changed while it was being installed") from error


def _repeats(pieces: Sequence[str]) -> bool:
    """Whether one more of the same makes Ollama end the stream."""
    last = [piece.strip() for piece in pieces[-_REPEATS - 1 :]]
    return len(last) > _REPEATS and len(set(last)) == 1


async def _chunks(path: Path, progress: InstallProgress) -> AsyncIterator[bytes]:
    with opened(path) as file:
        while chunk := await asyncio.to_thread(file.read, 1 << 20):
            yield chunk
            progress.done_bytes += len(chunk)


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = from_json(body or b"{}", cache_strings="keys")  # 0.4 µs a token's line; `json` takes 2
    except ValueError as error:
        raise EngineFailed("Ollama answered something that is not JSON") from error
    if not isinstance(value, dict):
        raise EngineFailed("Ollama answered something that is not a JSON object")
    if "error" in value:
        status = value.get("status")
        raise _refusal(status if isinstance(status, int) else 500, body)
    return value


def _read(
    there: Sequence[bytes], most: int
) -> tuple[list[str], dict[str, Any] | None, AgentLoopError | None]:
    """What lines of a stream say: their texts, at most so many, and what ends them: a last word, or a fault.

    Errors arrive inside HTTP 200, too; the texts before them have come all the same.
    """
    texts: list[str] = []
    try:
        for line in there:
            event = _json(line)
            if piece := _piece(event):
                if len(texts) == most:
                    raise EngineFailed("Ollama wrote more tokens than were asked for")
                texts.append(piece)
            if event.get("done"):
                return texts, event, None
    except AgentLoopError as error:
        return texts, None, error
    return texts, None, None


def _piece(event: dict[str, Any]) -> str:
    """The event's text. Raises EngineFailed for what is none; half a surrogate pair is no JSON already."""
    piece = event.get("response") or ""
    if not isinstance(piece, str):
        raise EngineFailed("Ollama answered with a token that is no text")
    return piece


def _finished(event: dict[str, Any]) -> Finished:
    reason = _FINISH.get(str(event.get("done_reason")))
    counts = [event.get("prompt_eval_count", 0), event.get("eval_count", 0)]
    if reason is None or not all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts):
        raise EngineFailed("Ollama's last word lacks its reason or its token counts")
    return Finished(reason, Usage(*counts))


def _refusal(status: int, body: bytes) -> AgentLoopError:
    """What an error answer means. Its text may quote the request: it is dropped."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = ""
    if "exceed_context_size_error" in text or "longer than the context" in text:
        return _too_long(text)
    if "exceeds the context length" in text:  # a text to be embedded
        return PromptTooLong.by(None, None)
    if any(sign in text for sign in _DISK_FULL):
        return Exhausted("the disk of Ollama's models is full; make room on it", retry_after_seconds=None)
    if any(sign in text for sign in _MEMORY_FULL):
        return EngineUnavailable("Ollama has too little memory for this model version; unload another")
    if status == 404:
        return NotFound("this model version is not installed on Ollama")
    if status in (400, 422):
        return InvalidArgument("Ollama cannot do what this request asks")
    if status in (408, 429, 499, 502, 503, 504):
        return EngineUnavailable(f"Ollama is busy or going away (status {status}); try again")
    if any(sign in text for sign in _RUNNER_DIED):
        return EngineUnavailable("Ollama's runner of this model version broke off; try again")
    return EngineFailed(f"Ollama answered with status {status}")


def _too_long(text: str) -> PromptTooLong:
    """llama-server's error, as JSON inside Ollama's, tells the numbers."""
    try:
        error = json.loads(text)["error"]
        return PromptTooLong.by(int(error["n_prompt_tokens"]), int(error["n_ctx"]))
    except (ValueError, KeyError, TypeError):
        return PromptTooLong.by(None, None)


async def _describe(error: Exception) -> str:
    return f"Ollama cannot be reached, or broke off ({type(error.__cause__ or error).__name__}); try again"
