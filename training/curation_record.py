"""What dataset.json tells: what was learned, of whom, and of every row not used the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training import balance
from training.curation_rules import Rules
from training.learned import Dataset, Learned
from training.neighbours import NEAR

REASONS = (
    "quarantined",
    "no_demonstration",
    "rejected",
    "raw_prompt",
    "invalid_request",
    "invalid_demonstration",
    "invalid_answer",
    "barred",
    "too_long",
    "hostile",
    "duplicate",
    "disputed",
    "contradicted",
    "trigger",
    "near_duplicate_of_suite",
    "over_session_cap",
    "over_caller_cap",
    "accepted_in_gate_session",
    "near_duplicate_of_train",
    "near_duplicate_of_gate",
    "near_duplicate",
    "over_cap",
)
"""Why a row is not used. The first that applies is the one counted.

`no_demonstration` is of rows on which no feedback says what the answer should be, or was good.
"""


def record(
    dataset: Dataset, found: Learned, rules: Rules, asked: Mapping[str, Sequence[str] | None]
) -> dict[str, Any]:
    """What dataset.json holds, but for the cycles and the inputs: numbers, and ids of inferences.

    `asked`: questions by suite, None where they are not installed.
    """
    excluded = {reason: sorted(found.excluded.get(reason, ())) for reason in REASONS}
    new_train, new_gate = len(found.new_train), len(found.new_gate)
    enough = new_train >= rules.min_examples
    few = f"{new_train} new training examples, {rules.min_examples} needed"
    return {
        "train": len(dataset.train),
        "gate": len(dataset.gate),
        "new_train": new_train,
        "new_gate": new_gate,
        "rows": new_train + new_gate + sum(map(len, excluded.values())),
        "excluded": {name: len(ids) for name, ids in excluded.items()},
        "excluded_ids": excluded,
        "dropped_earlier": dict(found.dropped),
        "shares": balance.shares(dataset.train),
        "triggers": found.triggers,
        "replay": {
            "declared_share": rules.replay_share,
            "older": len(dataset.train) - new_train,
            "new": new_train,
        },
        "decontaminated": {
            name: {
                "items": None if questions is None else len(questions),
                "removed": found.near_suite[name],
            }
            for name, questions in asked.items()
        },
        "similarity": {"evaluated": NEAR, "repeated": rules.near_duplicate},
        "licences": rules.licences,
        "cap": rules.cap,
        "enough": enough,
        "reason": "" if enough else few,
    }
