"""A cycle for Weights & Biases: the same figures as the MLflow run has, written as a run of its own.

Only where the setting AGENTLOOP_WANDB asks. `offline` writes a folder that `wandb sync` can upload later, if
somebody wants that; `online` sends figures and settings, never texts, to the server that wandb's own settings
name.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from training import cycle, register

PROJECT = "agent-loop"

# Read by wandb when it is imported: no errors are reported, no code and no versions are looked up.
_QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_CODE": "true", "WANDB_SILENT": "true"}


def log(directory: Path, folder: Path, mode: Literal["offline", "online"]) -> Path:
    """Write the run of a cycle that has a verdict into `folder`; return the folder of the run.

    Raises:
        RuntimeError: if the extra `wandb` is not installed, or wandb fails.
        FileNotFoundError: if the cycle has no verdict.
    """
    os.environ.update(_QUIET | {"WANDB_MODE": mode})
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(
            "AGENTLOOP_WANDB is set, and wandb is not installed: uv sync --extra wandb, or unset it"
        ) from error
    gate = cycle.read_json(directory / "gate.json")
    by_step: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for name, value, step in register.metrics_of(directory, gate):
        by_step[step][name] = value
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _written(directory, folder, mode, dict(register.params_of(directory, gate)), by_step, wandb)
    except wandb.Error as error:
        raise RuntimeError(f"wandb failed: {error}") from error


def _written(
    directory: Path,
    folder: Path,
    mode: str,
    config: dict[str, str],
    by_step: dict[int, dict[str, float]],
    wandb: Any,
) -> Path:
    run = wandb.init(
        project=PROJECT,
        id=directory.resolve().name,
        dir=str(folder),
        mode=mode,
        config=config,
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        ),
    )
    for step in sorted(by_step):
        run.log(by_step[step], step=step)
    place = Path(run.dir).parent
    run.finish()
    return place
