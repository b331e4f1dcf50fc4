"""LiteLLM's proxy, from PyPI, in a virtual environment of its own beside the user's caches.

Its log in Postgres needs Prisma's engine, a program that is downloaded from outside the package registries:
it runs without, which is in its favour. One worker, as we have one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

VERSION = "1.106.2"
KEY = "sk-benchmark"
_ROOT = Path(__file__).parents[2]
_READY_SECONDS = 300.0


def install() -> Path:
    """Its program; takes a minute, the first time on a machine."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = caches / "agentloop" / f"litellm-{VERSION}"
    program = place / "bin" / "litellm"
    if not program.exists():
        uv = subprocess.run([_ROOT / "scripts/uv.sh"], check=True, capture_output=True, text=True)
        python = place / "bin" / "python"
        for arguments in (
            ("venv", "--quiet", "--allow-existing", "--python", "3.11", str(place)),
            ("pip", "install", "--quiet", "--python", str(python), f"litellm[proxy]=={VERSION}"),
        ):
            subprocess.run([uv.stdout.strip(), *arguments], check=True)
    return program


class LiteLLM:
    """The proxy before Ollama models: name -> (Ollama's URL, its model, options to ask it with)."""

    def __init__(self, folder: Path, models: dict[str, tuple[str, str, dict[str, int]]]) -> None:
        self._folder = folder
        self._models = models
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def start(self) -> Self:
        """Start it, on the cores of the caller, and wait until it answers."""
        self._folder.mkdir()
        config = self._folder / "config.yaml"  # YAML holds JSON
        config.write_text(json.dumps(self._configuration()))
        kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [install(), "--config", config, "--host", "127.0.0.1", "--port", str(self._port)],
                cwd=self._folder,
                env={
                    **kept,
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it fetches one
                    "LITELLM_MODE": "PRODUCTION",
                    "LITELLM_LOG": "ERROR",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _configuration(self) -> dict[str, object]:
        models = [
            {
                "model_name": name,
                "litellm_params": {"model": f"ollama/{model}", "api_base": url, **options},
            }
            for name, (url, model, options) in self._models.items()
        ]
        settings = {"telemetry": False, "drop_params": True}
        return {
            "model_list": models,
            "litellm_settings": settings,
            "general_settings": {"master_key": KEY},
        }

    def _until_ready(self) -> None:
        assert self._process is not None
        until = time.monotonic() + _READY_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health/liveliness", timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                if self._process.poll() is not None or time.monotonic() > until:
                    said = (self._folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"LiteLLM's proxy did not start: {error}\n{said}") from error
                time.sleep(0.2)
