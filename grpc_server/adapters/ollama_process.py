"""An `ollama serve` of our own: on a free port of 127.0.0.1, calling nobody, gone when we are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from grpc_server.adapters.embedded_child import GOMP_SPINCOUNT
from grpc_server.domain.errors import EngineUnavailable

_PACKAGE_ROOT = Path(__file__).parents[2]
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0

MAX_LOADED_MODELS = 3
"""Champion, candidate, and one to compare with."""

PROMPT_CACHE_MIB = 256
"""Host memory for prompts of past turns, a model (llama-server's own default is 8 GiB)."""

_DROPPED = ("AGENTLOOP_", "OLLAMA_", "LLAMA_ARG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class OllamaProcess:
    """Runs `binary` as long as the context is open; its models lie in `models_dir`.

    `async with OllamaProcess("ollama", folder, parallel=4) as process:` and ask `process.url`. If Ollama dies
    meanwhile it is started anew on the same port.

    Raises:
        EngineUnavailable: on entering, if there is no such program or it does not come up.
    """

    def __init__(self, binary: str | Path, models_dir: Path, *, parallel: int = 4) -> None:
        self._binary = str(binary)
        self._models_dir = models_dir.resolve()
        self._parallel = parallel
        self._guard: asyncio.subprocess.Process | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Of the guard that Ollama and its runners descend from; 0 when nothing runs."""
        return self._guard.pid if self._guard else 0

    async def __aenter__(self) -> OllamaProcess:
        self._models_dir.mkdir(parents=True, exist_ok=True)
        self._guard = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "grpc_server.adapters.ollama_guard",
            self._binary,
            cwd=_PACKAGE_ROOT,
            env=environment(dict(os.environ), self._models_dir, self._parallel),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            process_group=0,  # see `embedded_process`
        )
        try:
            self.url = await asyncio.wait_for(self._announced(self._guard), _START_SECONDS)
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, TimeoutError):
                raise EngineUnavailable(
                    f"{self._binary} serve did not come up in {_START_SECONDS:.0f} s"
                ) from error
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        assert guard.stdin  # noqa: S101
        guard.stdin.close()
        try:
            await asyncio.wait_for(guard.wait(), _STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                guard.kill()
            await guard.wait()

    async def _announced(self, guard: asyncio.subprocess.Process) -> str:
        assert guard.stdout and guard.stderr  # noqa: S101
        line = await guard.stdout.readline()
        if not line:
            said = (await guard.stderr.read()).decode(errors="replace").strip()[-1000:]
            raise EngineUnavailable(
                f"{self._binary} serve does not start; set AGENTLOOP_OLLAMA_BIN to an Ollama of at least 0.34"
                f" (`make ollama` installs one): {said}"
            )
        return str(json.loads(line)["url"])


def environment(inherited: dict[str, str], models_dir: Path, parallel: int) -> dict[str, str]:
    """What Ollama is told. Nothing that was meant for another Ollama, no secret of ours and no proxy gets in.

    The variables: https://github.com/ollama/ollama/blob/v0.34.0/envconfig/config.go
    """
    kept = {name: value for name, value in inherited.items() if not name.upper().startswith(_DROPPED)}
    return {
        "GOMP_SPINCOUNT": GOMP_SPINCOUNT,
        **kept,
        "HOME": str(models_dir),  # it writes a key pair to ~/.ollama
        "OLLAMA_MODELS": str(models_dir),
        "OLLAMA_NO_CLOUD": "1",  # or it fetches recommendations from its vendor
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NUM_PARALLEL": str(parallel),
        "OLLAMA_MAX_LOADED_MODELS": str(MAX_LOADED_MODELS),
        "LLAMA_ARG_CACHE_RAM": str(PROMPT_CACHE_MIB),
    }
