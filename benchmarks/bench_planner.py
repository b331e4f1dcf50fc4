"""What `python -m training plan` predicts a training step to take, beside what one takes.

Each case is a real step of a real model with random weights on the processor, in a process of its own: Gemma
3 270M at its true shape, and small Gemma 2, 3 and 3n, with several microbatches and lengths, checkpointing on
and off, NF4 packed and not, adapters and every weight, and divided among two processes. `planner_error` is
the worst relative error against what PyTorch's allocator had given out at most; `planner_error_resident`
against the process's memory (VmHWM less what its libraries take), which counts what kernels and malloc take
beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from benchmarks.line import Line
from training.base import stay_offline
from training.memory import Load, step_memory
from training.recipe import Recipe, read

SMALL: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "sliding_window": 256,
}
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 32768,
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, how it is trained, and a microbatch."""

    kind: str
    examples: int
    length: int
    checkpointing: bool = False
    method: str = "qlora"
    frozen_weights: str = "dequantized"
    dtype: str = "bfloat16"
    processes: int = 1

    @property
    def load(self) -> Load:
        """The microbatch; a quarter of it is learned, as in the log's own examples."""
        return Load(self.examples, self.length, self.length // 4)

    @property
    def attention(self) -> str:
        """As the loader would choose on a processor."""
        return "eager" if self.kind == "gemma2" else "sdpa"

    def recipe(self) -> Recipe:
        """The default recipe, changed."""
        return read().model_copy(
            update={
                "gradient_checkpointing": self.checkpointing,
                "method": self.method,
                "frozen_weights": self.frozen_weights,
                "sharding": "fsdp" if self.processes > 1 else "none",
            }
        )

    def config(self, *, small: bool = False) -> Any:
        """The model's configuration; a very small one to warm up with."""
        stay_offline()
        from transformers import AutoConfig

        if self.kind == "gemma3-270m" and not small:
            from training.plan import shape

            return shape(self.kind)
        kind = "gemma3_text" if self.kind == "gemma3-270m" else self.kind
        changes: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 64} if small else {}
        if small and kind == "gemma3n_text":
            changes["vocab_size_per_layer_input"] = 2048
        return AutoConfig.for_model(kind, **(SMALL | MORE.get(kind, {}) | changes))


CASES = (
    Case("gemma3-270m", 1, 256),
    Case("gemma3-270m", 4, 256),
    Case("gemma3-270m", 4, 256, checkpointing=True),
    Case("gemma3-270m", 2, 512, frozen_weights="nf4"),
    Case("gemma3-270m", 2, 256, dtype="float32"),
    Case("gemma3_text", 8, 256),
    Case("gemma3_text", 16, 256, checkpointing=True),
    Case("gemma3_text", 4, 512, frozen_weights="nf4"),
    Case("gemma3_text", 4, 256, method="full"),
    Case("gemma2", 4, 384),
    Case("gemma3n_text", 4, 384),
    Case("gemma3n_text", 8, 384, checkpointing=True),
    Case("gemma3_text", 4, 256, frozen_weights="nf4", processes=2),
    Case("gemma3_text", 4, 256, method="full", processes=2),
    Case("gemma3n_text", 4, 384, checkpointing=True, processes=2),
)


def predicted(case: Case) -> int:
    """What the planner says."""
    import torch

    dtype = getattr(torch, case.dtype)
    return step_memory(
        case.config(),
        case.recipe(),
        case.load,
        dtype,
        case.attention,
        on_gpu=False,
        processes=case.processes,
    ).total


def measured(case: Case) -> dict[str, int]:
    """What a step takes. malloc gives back what is freed at once, so that the peak is the step's own."""
    together = ("torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}", "--module")
    done = subprocess.run(
        [
            *(sys.executable, "-m", *(together if case.processes > 1 else ())),
            *("benchmarks.planner_step", json.dumps(asdict(case))),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(cases: tuple[Case, ...] = CASES) -> list[Line]:
    """Measure every case, one after the other."""
    of_allocated, of_resident = [], []
    for case in cases:
        said, found = predicted(case), measured(case)
        of_allocated.append(said / found["allocated"] - 1)
        of_resident.append(said / found["resident"] - 1)
        print(
            f"{case}: predicted {said / 2**20:.0f} MiB, allocated {found['allocated'] / 2**20:.0f},"
            f" resident {found['resident'] / 2**20:.0f}",
            file=sys.stderr,
        )
    peer = f"{len(cases)} real steps"
    return [
        Line("planner", "planner_error", max(map(abs, of_allocated)), "share", peer, 0.0, "<= 0.1"),
        Line("planner", "planner_error_mean", mean(map(abs, of_allocated)), "share", peer, 0.0),
        Line("planner", "planner_error_resident", max(map(abs, of_resident)), "share", peer, 0.0),
        Line("planner", "planner_error_resident_mean", mean(map(abs, of_resident)), "share", peer, 0.0),
    ]
