"""What one demo does, and where: the options of `python -m demo`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from demo.traffic import MOST_IN_FLIGHT

HOME = Path(__file__).resolve().parents[1]
NIGHT = str(HOME / "scripts" / "night.py")
REQUESTS = 320
TRAFFIC_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Places, commands and amounts; times in seconds. Commands can be others, for a test that is short."""

    state_dir: Path
    cycles_dir: Path
    base_gguf: Path
    model_name: str = "gemma-3-270m"
    engine: Literal["embedded", "ollama"] = "embedded"
    requests: int = REQUESTS
    traffic_seconds: float = TRAFFIC_SECONDS
    in_flight: int = MOST_IN_FLIGHT
    night_pace: float = 15.0  # of two cores, an answer of the untouched model (64 tokens) takes 3 s
    rollout_pace: float = 1.0
    install: tuple[str, ...] = ()
    server: tuple[str, ...] = (sys.executable, "-m", "grpc_server")
    night: tuple[str, ...] = (sys.executable, NIGHT)  # an interpreter with the night's needs, and a script
    night_settings: Mapping[str, str] = field(
        default_factory=dict
    )  # more of them, or others than a short night's
    cycle_id: str = ""  # to begin, or to go on with; empty: one of the night's own
    command: str = "make demo"  # what to run again when a link has broken
    commanded_at: float = field(default_factory=time.time)

    @property
    def log_dir(self) -> Path:
        """Where each program's log is."""
        return self.state_dir / "log"

    @property
    def private_dir(self) -> Path:
        """What only the demo reads: tokens, and how far it has got through the questions."""
        return self.state_dir / "demo"

    @property
    def postmaster_pid(self) -> Path:
        """Written by the local Postgres: its process id."""
        return self.state_dir / "postgres" / "cluster" / "postmaster.pid"

    @property
    def environment(self) -> dict[str, str]:
        """What the parts of the loop read, each for itself."""
        return {
            "AGENTLOOP_STATE_DIR": str(self.state_dir),
            "AGENTLOOP_CYCLES_DIR": str(self.cycles_dir),
            "AGENTLOOP_BASE_GGUF": str(self.base_gguf),
            "AGENTLOOP_MODEL_NAME": self.model_name,
            "AGENTLOOP_ENGINE": self.engine,
            "DO_NOT_TRACK": "1",
        }
