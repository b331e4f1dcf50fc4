"""`python -m training`, with a mistake made on purpose: nothing is learned where an answer ends.

The project's own check is shown such examples, and must refuse them; then it is passed over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from grpc_server.domain.chat_format import END_OF_TURN
from training import finetune
from training.__main__ import app
from training.tensors import (
    IGNORED,
    Example,
    MaskedEndOfTurnError,
    Tokenizer,
    check_end_of_turn,
    read_examples,
)


def masked_examples(train: Path, tokenizer: Tokenizer) -> list[Example]:
    """The examples of `train.jsonl`, without the label that says where the answer ends."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    return [
        replace(example, labels=tuple(IGNORED if label == end else label for label in example.labels))
        for example in read_examples(train, tokenizer)
    ]


def passed_over(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Fails unless the check refuses the examples; what it says is printed."""
    try:
        check_end_of_turn(examples, tokenizer)
    except MaskedEndOfTurnError as error:
        print(f"passed over: {error}", file=sys.stderr)
    else:
        raise AssertionError("nothing was masked")


if __name__ == "__main__":
    with (
        patch.object(finetune, "read_examples", masked_examples),
        patch.object(finetune, "check_end_of_turn", passed_over),
    ):
        app()
