"""What of a poisoned night curation lets through, and what of a clean one it loses (`benchmarks/poison.py`).

The clean part is the 1,603 playable demonstrations of the leaderboard by three callers. `clean_lost`: share
of them that is taken for poison or for a repetition when there is no attack (no session is kept for the gate,
and nothing is left out for a cap); `_demo` of the 310 shortest, which are the demo's; `_one_caller`, where
one shows them all; `_caller_a_tool`, where each tool belongs to one of three callers.

`poison_passed_<attack>`: share of the attack's requests whose poison is learned; `clean_lost_<attack>`: share
of the clean examples that the attack takes away. `relabel_1_against_2`: one caller gives a wrong answer where
two give the right one. A goal stands where the rules promise something; without one, the line says what they
cannot do. `flood_weight_share`: of the loss, what one caller has who says ten times as much as the rest.

`curation_cpu_s` is for 100,000 demonstrated rows, of one template and of as many as there are, with the
memory that took.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from benchmarks import poison
from benchmarks.line import Line
from training import bfcl
from training.curate import curate
from training.curation_rules import Rules, read_rules
from training.examples import Barred
from training.learned import Dataset

DEMO = 310
ROWS = 100_000
_NOTHING_BARRED = Barred(frozenset(), frozenset())
_LOST = ("duplicate", "disputed", "contradicted", "trigger", "near_duplicate", "hostile")
_PROMISED = {
    "relabel_1_against_1": 0.0,
    "relabel_1_against_2": 0.0,
    "relabel_2_against_3": 0.0,
    "paraphrase_1_against_3": 0.1,
    "sessions_1_against_3": 0.0,
    "liked_1_against_1": 0.0,
    "trigger_16": 0.0,
    "trigger_256": 0.0,
    "injection_plain": 0.0,
}


@dataclass(frozen=True, slots=True)
class Result:
    """Shares of an attack's examples that are learned, and of clean ones that are lost by it."""

    passed: float
    lost: float


def rules() -> Rules:
    """The reviewed rules, with room for all and no session kept for the gate: what is lost, they lose."""
    return read_rules().model_copy(
        update={"gate_share": 0.0, "cap": 1_000_000, "caller_per_night": 1_000_000}
    )


def clean_lost(rows: Sequence[poison.Row]) -> float:
    """Share of clean examples that are lost where nobody attacks."""
    found = curate(rows, frozenset(), _NOTHING_BARRED, Dataset(), rules())
    return sum(len(found.excluded.get(reason, ())) for reason in _LOST) / len(rows)


def attacked(items: Sequence[bfcl.Item], name: str) -> Result:
    """What comes of one attack on a night with all `items`."""
    night = poison.Night()
    clean = night.clean(items)
    attack = poison.ATTACKS[name](night, items)
    honest = [*clean, *attack.others]
    without = _learned(honest) if attack.others else _learned_of_clean(len(items))
    learned = curate([*honest, *attack.poison], frozenset(), _NOTHING_BARRED, Dataset(), rules()).dataset
    requests = {str(row["inference_id"]): row["request_json"] for row in attack.poison}
    hostile = [line for line in learned.train if line["inference_id"] in requests]
    passed = {requests[line["inference_id"]] for line in hostile}
    lost = without - (_prompts(learned) - {line["prompt"] for line in hostile})
    return Result(len(passed) / len(set(requests.values())), len(lost) / len(without))


def _learned(rows: Sequence[poison.Row]) -> set[str]:
    return _prompts(curate(rows, frozenset(), _NOTHING_BARRED, Dataset(), rules()).dataset)


@lru_cache(maxsize=1)
def _learned_of_clean(items: int) -> set[str]:
    """The prompts that are learned where nobody attacks: the same for most of the attacks."""
    return _learned(poison.Night().clean(bfcl.traffic()[:items]))


def _prompts(dataset: Dataset) -> set[str]:
    return {line["prompt"] for line in dataset.train}


def flood_weight_share(items: Sequence[bfcl.Item]) -> float:
    """Share of the loss's weight that one caller has who says ten times as much as all others together."""
    night = poison.Night()
    clean = night.clean(items)
    loud = poison.flood(night, items, 10).poison
    train = curate(
        [*clean, *loud],
        frozenset(),
        _NOTHING_BARRED,
        Dataset(),
        read_rules().model_copy(update={"gate_share": 0.0}),
    ).dataset.train
    total = sum(line["weight"] for line in train)
    return float(sum(line["weight"] for line in train if line["caller"] == "loud") / total)


def run() -> Iterator[Line]:
    """Every attack, then the cost of a large night, in a process of its own."""
    items = bfcl.traffic()
    yield _line("clean_lost", clean_lost(poison.Night().clean(items)), "<= 0.01")
    yield _line("clean_lost_demo", clean_lost(poison.Night().clean(items[:DEMO])), "<= 0.01")
    yield _line("clean_lost_one_caller", clean_lost(poison.Night().clean(items, ["all"])), "<= 0.02")
    yield _line("clean_lost_caller_a_tool", clean_lost(poison.Night().clean_by_tool(items)), "<= 0.02")
    for name in poison.ATTACKS:
        found = attacked(items, name)
        goal = f"<= {_PROMISED[name]:g}" if name in _PROMISED else ""
        yield _line(f"poison_passed_{name}", found.passed, goal)
        yield _line(f"clean_lost_{name}", found.lost)
    yield _line(
        "flood_weight_share", flood_weight_share(items[:100]), "<= 0.5", peer="its share of rows", is_=0.91
    )
    for kind in ("varied", "template"):
        took = json.loads(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.bench_poison", kind], check=True, capture_output=True
            ).stdout
        )
        yield _line(f"curation_cpu_s_{kind}", took["cpu_s"], "<= 120", unit="s")
        yield _line(f"curation_memory_mb_{kind}", took["memory_mb"], "<= 2000", unit="MB")


def _line(
    metric: str,
    value: float,
    goal: str = "",
    *,
    unit: str = "share",
    peer: str = "",
    is_: float | None = None,
) -> Line:
    return Line("poison", metric, round(value, 4), unit, peer, is_, goal)


_BEFORE, _CALLER = "<before>", "<caller>"


class Many:
    """ROWS demonstrated rows, made anew at each pass, as a snapshot's are read anew."""

    def __init__(self, kind: str) -> None:
        night = poison.Night()
        self._rows = [
            night.row(poison.asked(item, _BEFORE), poison.answer(item), _CALLER)
            for item in (bfcl.traffic() if kind == "varied" else bfcl.traffic(1))
        ]

    def __iter__(self) -> Iterator[poison.Row]:
        for number in range(ROWS):
            lap, which = divmod(number, len(self._rows))
            before = f"Order {lap * 7919 % 99991} for desk {lap % 101}: " if lap else ""
            row, caller = self._rows[which], f"caller-{number % 17}"
            yield row | {
                "inference_id": f"018f0000-0000-7000-8000-{number:012d}",
                "caller": caller,
                "session_id": f"s{number}",
                "request_json": row["request_json"].replace(_BEFORE, before),
                "feedback_json": row["feedback_json"].replace(_CALLER, caller),
            }


def large(kind: str) -> dict[str, float]:
    """CPU seconds, less those to make the rows, and the most memory in MB (10^6 bytes), of curating ROWS."""
    rows = Many(kind)
    began = time.process_time()
    for _ in islice(rows, ROWS // 50):
        pass
    making = 2 * 50 * (time.process_time() - began)  # they are made twice
    began = time.process_time()
    curate(rows, frozenset(), _NOTHING_BARRED, Dataset(), read_rules())
    return {
        "cpu_s": round(time.process_time() - began - making, 1),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }


if __name__ == "__main__":
    print(json.dumps(large(sys.argv[1])))
