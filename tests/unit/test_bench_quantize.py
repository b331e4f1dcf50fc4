"""What the benchmark of quantization tells of a record, and of which type it says that it may serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import bench_quantize
from training import quantize


def tried(kind: str, size: int, divergence: float, matrix: bool = False) -> dict[str, Any]:
    return {
        "type": kind,
        "importance_matrix": matrix,
        "size_bytes": size * 10**6,
        "kl_divergence": divergence,
        "same_top_share": 0.95,
        "decode_tokens_per_s": 40.0,
    }


def test_the_smallest_within_the_thresholds_is_told_beside_bf16() -> None:
    made = {
        "unquantized": {"size_bytes": 540 * 10**6, "decode_tokens_per_s": 20.0},
        "tried": [
            tried("Q4_K_M", 253, 0.2),
            tried("Q5_K_M", 260, 0.013, True),
            tried("Q5_K_M", 260, 0.029),
            tried("Q8_0", 292, 0.002),
        ],
    }
    lines = {line.metric: line for line in bench_quantize.lines(made, quantize.read_config())}
    assert len(lines) == 4 * 4 + 1
    passes = lines["smallest_that_passes"]
    assert (passes.unit, passes.value, passes.holds) == ("of bf16: Q5_K_M with importance", 0.4815, True)
    assert lines["kl_divergence_q8_0"].holds and lines["kl_divergence_q4_k_m"].holds is None
    assert lines["decode_tokens_per_s_q8_0"].peer_value == 20.0


def test_the_training_set_is_as_quantize_reads_it(tmp_path: Path) -> None:
    bench_quantize.write_dataset(tmp_path)
    first = json.loads((tmp_path / "dataset" / "train.jsonl").read_text().splitlines()[0])
    assert first["completion"].endswith("<end_of_turn>")
    assert len(quantize.sample_text(tmp_path, 0, 12_000)) > 12_000
    assert len(quantize.sample_text(tmp_path, 12_000, 12_000)) > 12_000
