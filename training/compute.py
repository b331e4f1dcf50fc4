"""In what floating-point type this processor computes fastest: measured, as it cannot be guessed."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import torch

from training import cycle


def compute_dtype(wanted: str, state_dir: Path) -> torch.dtype:
    """The type to compute in: `wanted`, or for "auto" the one that this processor multiplies faster.

    What was measured once is kept in `<state_dir>/cache/compute.json`, by processor and torch: measured anew
    on a busy machine it may come out otherwise, and the same seed would give another adapter.

    A GPU computes in bfloat16 where it can. A processor with AVX512-BF16 is three times as fast in bfloat16
    as in float32 (measured: 160 against 60 GFLOP a second and core), one without is slower.
    """
    if wanted == "auto" and torch.cuda.is_available():
        wanted = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if wanted == "auto":
        wanted = _measured_once(state_dir / "cache" / "compute.json")
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _measured_once(kept: Path) -> str:
    machine = f"{cycle.processor()}, torch {torch.__version__}"
    known = cycle.read_json(kept) if kept.is_file() else {}
    if machine not in known:
        faster = _seconds_to_multiply(torch.bfloat16) < 0.8 * _seconds_to_multiply(torch.float32)
        known |= {machine: "bfloat16" if faster else "float32"}
        cycle.write_json(kept, known)
    return str(known[machine])


def _seconds_to_multiply(dtype: torch.dtype) -> float:
    """The best of a few: another process may have the processor during any of them."""
    left, right = torch.ones(512, 640, dtype=dtype), torch.ones(640, 2048, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = perf_counter()
        torch.matmul(left, right)
        best = min(best, perf_counter() - began)
    return best
