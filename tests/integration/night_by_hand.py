"""A cycle's folder as a whole night leaves it, with figures made up but possible; parts can be left out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.integration.log_by_hand import WEATHER, assistant, request, user
from training import cycle

CYCLE = "20260131T020000Z"
BASE = {"model_version": "gemma-3-270m:base", "sha256": "b" * 64}
CANDIDATE = {"model_version": f"gemma-3-270m:{CYCLE}", "sha256": "c" * 64}
STEPS = ("freeze", "validate", "curate", "finetune", "quantize", "evaluate", "gate", "register", "roll_out")
_BEGAN = datetime(2026, 1, 31, 2, 0, 5, tzinfo=UTC)
_SECONDS = {
    "freeze": 1.2,
    "validate": 9.8,
    "curate": 2.4,
    "finetune": 322.0,
    "quantize": 58.0,
    "evaluate": 271.0,
    "gate": 0.4,
    "register": 6.3,
}
_MEMORY = {"finetune": 5.1, "quantize": 3.2, "evaluate": 1.9}


def make(folder: Path, *, until: str = "roll_out", verdict: str = "pass", rolled: str = "promoted") -> Path:
    """The folder of a cycle that came as far as `until`."""
    directory = folder / CYCLE
    directory.mkdir(parents=True)
    began = _BEGAN
    for name in STEPS[: STEPS.index(until) + 1]:
        makers: dict[str, Callable[[Path], None]] = {
            "freeze": _freeze,
            "validate": _validate,
            "curate": _curate,
            "finetune": _finetune,
            "quantize": _quantize,
            "evaluate": _evaluate,
            "gate": lambda at: _gate(at, verdict),
            "register": _register,
            "roll_out": lambda at: _roll_out(at, rolled),
        }
        makers[name](directory)
        if name in _SECONDS:
            began = _note(directory, name, began)
    return directory


def _note(directory: Path, name: str, began: datetime) -> datetime:
    ended = began + timedelta(seconds=_SECONDS[name])
    note = {
        "started_at": began.isoformat(),
        "ended_at": ended.isoformat(),
        "seconds": _SECONDS[name],
        "peak_memory_gb": _MEMORY.get(name, 0.4),
        "versions": {"python": "3.11.7"},
        "seed": 7 if name == "finetune" else None,
        "outcome": "done",
        "reason": "",
    }
    cycle.write_json(directory / "steps" / f"{name}.json", note)
    return ended + timedelta(seconds=3)


def _freeze(directory: Path) -> None:
    record = {
        "cycle_id": CYCLE,
        "watermark_from": "0",
        "watermark_to": "1874",
        "rows": 262,
        "feedback_rows": 240,
        "frozen_at": _BEGAN.isoformat(),
    }
    cycle.write_json(directory / "snapshot" / "snapshot.json", record)


def _validate(directory: Path) -> None:
    says = {
        "schema": "the columns, their types and their order are those that are known",
        "volume": "between 1 and 5,000,000 rows",
        "quarantine_share": "at most a fifth of the rows is quarantined for a fault of the log",
        "failure_share": "at most three in ten inferences ended as error or aborted",
    }
    numbers = {"volume": 262, "quarantine_share": 0.0038, "failure_share": 0.0229}
    expectations: list[dict[str, Any]] = [
        {
            "name": name,
            "says": text,
            "blocking": True,
            "success": True,
            "observed": {"value": numbers[name]} if name in numbers else {"mismatched": []},
        }
        for name, text in says.items()
    ]
    expectations += [
        {
            "name": name,
            "says": text,
            "blocking": False,
            "success": broken == 0,
            "observed": {"rows": 262, "broken_by": broken},
        }
        for name, text, broken in (
            ("id_unique", "no other row has the id", 0),
            ("roles_alternate", "user and assistant take turns; tools answer calls", 0),
            ("text_printable", "no control characters in what is learned", 1),
            ("tool_calls_valid", "the answer's calls use the tools as their schemas say", 2),
        )
    ]
    record = {
        "success": True,
        "reason": "",
        "rows": 262,
        "accepted": 259,
        "quarantined_rows": 3,
        "quarantined": [],
        "expectations": expectations,
    }
    cycle.write_json(directory / "validation" / "result.json", record)
    docs = directory / "validation" / "data_docs"
    docs.mkdir()
    (docs / "index.html").write_text("<html></html>")


def _curate(directory: Path) -> None:
    excluded = {
        "quarantined": 3,
        "no_demonstration": 22,
        "invalid_request": 0,
        "invalid_demonstration": 0,
        "barred": 0,
        "too_long": 1,
        "duplicate": 4,
        "near_duplicate_of_gate": 2,
        "near_duplicate_of_train": 0,
        "over_cap": 0,
    }
    record = {
        "train": 192,
        "gate": 38,
        "new_train": 192,
        "new_gate": 38,
        "rows": 262,
        "excluded": excluded,
        "excluded_ids": {reason: [] for reason in excluded},
        "dropped_earlier": {},
        "cap": 2000,
        "cycles": [CYCLE],
        "enough": True,
        "reason": "",
    }
    cycle.write_json(directory / "dataset" / "dataset.json", record)
    with (directory / "dataset" / "gate.jsonl").open("w", encoding="utf-8") as file:
        for number in range(38):
            line = {
                "inference_id": f"gate-{number:02}",
                "session_id": f"s{number // 2}",
                "request": request(user(f"Will it rain in town {number} <b>tomorrow</b>?"), tools=(WEATHER,)),
                "demonstration": assistant("", ("weather", {"city": f"town {number}"})),
            }
            file.write(json.dumps(line) + "\n")


def _finetune(directory: Path) -> None:
    drawn = random.Random(7)
    (directory / "adapter").mkdir()
    with (directory / "adapter" / "training.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 97):
            line = {
                "step": step,
                "loss": round(0.12 + 2.1 * math.exp(-step / 16) + drawn.gauss(0, 0.04), 4),
                "lr": round(2e-4 * min(step / 8, (97 - step) / 89), 8),
                "tokens_per_s": round(231 + drawn.gauss(0, 6), 1),
                "memory_gb": round(4.2 + 0.9 * (1 - math.exp(-step / 10)), 3),
            }
            file.write(json.dumps(line) + "\n")
    record = {
        "config": {"epochs": 2, "lora": {"rank": 16, "alpha": 32}, "learning_rate": 2e-4},
        "loss_first": 2.1,
        "loss_last": 0.14,
        "examples": 192,
        "seconds": 322.0,
        "peak_memory_gb": 5.1,
        "tokens_per_s": 231.5,
    }
    cycle.write_json(directory / "adapter" / "finetune.json", record)


def _quantize(directory: Path) -> None:
    (directory / "model.gguf").write_bytes(b"GGUF")
    record = {
        "type": "Q4_K_M",
        "size_bytes": 253_112_000,
        "sha256": CANDIDATE["sha256"],
        "kl_divergence": 0.0213,
        "seconds": 58.0,
    }
    cycle.write_json(directory / "quantize.json", record)


def _evaluate(directory: Path) -> None:
    suites = {
        "simple_python": {"base_constrained": (100, 6), "champion": (100, 0), "candidate": (100, 37)},
        "gate": {"champion": (38, 1), "candidate": (38, 16)},
    }
    summary: dict[str, Any] = {}
    (directory / "evaluation").mkdir()
    for suite, subjects in suites.items():
        summary[suite] = {}
        with (directory / "evaluation" / f"{suite}.jsonl").open("w", encoding="utf-8") as file:
            for subject, (n, correct) in subjects.items():
                share = correct / n
                half = 1.96 * math.sqrt(max(share * (1 - share), 0.01) / n)
                summary[suite][subject] = {
                    "n": n,
                    "correct": correct,
                    "accuracy": share,
                    "ci_low": max(share - half, 0),
                    "ci_high": min(share + half, 1),
                    "length_share": 0.98 if subject == "champion" else 0.02,
                }
                for number in range(n):
                    right = _is_right(suite, subject, number, correct)
                    item = (
                        f"simple_python_{200 + number}" if suite == "simple_python" else f"gate-{number:02}"
                    )
                    answer = assistant("", ("weather", {"city": f"town {number}"}))
                    if not right:
                        rambled = "The <script>alert(1)</script> weather is " + "very " * 40
                        answer = assistant(rambled) if subject == "champion" else assistant("I cannot say.")
                    line = {
                        "item_id": item,
                        "subject": subject,
                        "model_version": (CANDIDATE if subject == "candidate" else BASE)["model_version"],
                        "model_sha256": (CANDIDATE if subject == "candidate" else BASE)["sha256"],
                        "session_id": f"s{number // 2}",
                        "correct": right,
                        "finish_reason": "tool_calls" if right else "length",
                        "output_tokens": 24,
                        "latency_ms": 850.0,
                        "answer": answer,
                    }
                    file.write(json.dumps(line) + "\n")
    cycle.write_json(directory / "evaluation" / "summary.json", summary)
    cycle.write_json(directory / "evaluation" / "evaluation.json", {"champion": BASE, "candidate": CANDIDATE})


def _is_right(suite: str, subject: str, number: int, correct: int) -> bool:
    """The champion's one right answer on the gate suite is one that the candidate gets wrong."""
    if suite == "gate" and subject == "champion":
        return number == 37
    return number < correct


def _gate(directory: Path, verdict: str) -> None:
    reasons = {
        "pass": "The candidate may serve: better than the champion: 0.370 against 0.000 on 100 items.",
        "fail": "The candidate is rejected: ends its answers: 98 of 100 answers are cut.",
        "inconclusive": "Too little is shown either way, so the champion stays: 0.020 against 0.000.",
    }
    low = {"pass": 0.28, "fail": -0.09, "inconclusive": -0.01}[verdict]
    record = {
        "verdict": verdict,
        "reason": reasons[verdict],
        "champion": BASE,
        "candidate": CANDIDATE,
        "decided_at": (_BEGAN + timedelta(seconds=700)).isoformat(),
        "checks": [
            _check("better than the champion", "simple_python", 100, 0.0, 0.37, low, verdict == "pass"),
            _check("no worse on what callers showed", "gate", 38, 0.026, 0.42, 0.21, verdict == "pass"),
            _check("ends its answers", "simple_python", 100, 0.98, 0.02, 0.0, verdict != "fail"),
        ],
    }
    cycle.write_json(directory / "gate.json", record)


def _check(
    name: str, suite: str, n: int, one: float, other: float, low: float, holds: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "suite": suite,
        "n": n,
        "champion": one,
        "candidate": other,
        "difference": other - one,
        "ci_low": low,
        "ci_high": low + 0.19,
        "rule": "candidate - champion: the whole interval above 0",
        "holds": holds,
        "refuted": not holds,
        "blocking": True,
        "detail": f"{other:.3f} against {one:.3f} on {n} items",
    } | ({} if name == "ends its answers" else {"against": "champion"})


def _register(directory: Path) -> None:
    record = {
        "registered_model": "gemma-3-270m",
        "version": "2",
        "run_id": "1f" * 16,
        "model_version": CANDIDATE["model_version"],
        "tracking_uri_scheme": "postgresql+psycopg",
        "champion_before": BASE["model_version"],
        "champion_before_version": "1",
    }
    cycle.write_json(directory / "registry.json", record)


def _roll_out(directory: Path, result: str) -> None:
    began = _BEGAN + timedelta(seconds=720)
    promoted = result == "promoted"
    stable = {"requests": 61, "error_share": 0.0, "length_share": 0.97, "latency_p50_ms": 1410.0}
    canary = {"requests": 57, "error_share": 0.0, "length_share": 0.02, "latency_p50_ms": 620.0}
    reason = (
        "57 requests of the canary and 61 of the stable version: no worse on any figure"
        if promoted
        else "0.97 of the canary's answers were cut by their length, 0.02 of the stable version's"
    )
    before = [{"model_version": BASE["model_version"], "role": "stable", "weight": 100}]
    after = [{"model_version": CANDIDATE["model_version"], "role": "stable", "weight": 100}]
    figures = {"stable": stable, "canary": canary}
    steps = [
        (0, "install", "go on", "installed and warm", {}),
        (4, "canary", "go on", f"{CANDIDATE['model_version']} gets 50 % of default", {}),
        (
            118,
            "analysis",
            "promote" if promoted else "roll_back",
            reason,
            figures,
        ),
        (119, "end", result, reason, {}),
    ]
    record = {
        "result": result,
        "reason": reason,
        "started_at": began.isoformat(),
        "route_before": before,
        "route_after": after if promoted else before,
        "requests": 131,
        "failed_requests": 0,
        "seconds": 119.4,
        "steps": [
            {
                "at": (began + timedelta(seconds=seconds)).isoformat(),
                "step": step,
                "decision": decision,
                "reason": why,
                "metrics": metrics,
            }
            for seconds, step, decision, why, metrics in steps
        ],
    }
    cycle.write_json(directory / "rollout.json", record)
