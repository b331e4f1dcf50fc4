"""What the pieces of fine-tuning promise: the recipe, the labels, the plan, the loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from training import compute, cycle, recipe
from training.compute import compute_dtype
from training.label_loss import ROWS, label_loss
from training.microbatch import grouped, packed, padded
from training.steps import learning_rate
from training.tensors import (
    IGNORED,
    Example,
    MaskedEndOfTurnError,
    check_end_of_turn,
    example,
    plan_steps,
    read_examples,
)

DEFAULT = recipe.read()


class Characters:
    """A tokenizer of one token a character; `<bos>` is 1 and `<end_of_turn>`, written "$" here, is 2."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return {"<bos>": 1, "<end_of_turn>": 2}[tokens]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [2 if letter == "$" else ord(letter) for letter in text]


def of_length(length: int) -> Example:
    return Example(tuple(range(length)), (IGNORED,) * (length - 2) + (2, IGNORED))


def options(**changes: Any) -> recipe.Recipe:
    return DEFAULT.model_copy(update=changes)


# The recipe.


def test_the_first_line_of_the_default_recipe_says_how_to_launch_it() -> None:
    lines = recipe.DEFAULT.read_text().splitlines()
    assert lines[0].startswith("#")
    assert "python -m training finetune --cycle" in lines[0]


def test_every_option_of_the_default_recipe_has_its_line() -> None:
    assert list(yaml.safe_load(recipe.DEFAULT.read_text())) == list(recipe.Recipe.model_fields)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"rank": 0}, "rank"), ({"learning_rate": -1}, "learning_rate"), ({"speed": 1}, "speed")],
)
def test_an_option_out_of_range_or_unknown_is_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(DEFAULT.model_dump() | change))
    with pytest.raises(ValueError, match=named):
        recipe.read(file)


def test_a_recipe_that_is_no_list_of_options_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ValueError, match="option: value"):
        recipe.read(file)


def test_the_compute_type_is_as_wanted_or_the_faster(tmp_path: Path) -> None:
    assert compute_dtype("bfloat16", tmp_path) is torch.bfloat16
    assert compute_dtype("float32", tmp_path) is torch.float32
    assert list(tmp_path.iterdir()) == []
    assert compute_dtype("auto", tmp_path) in (torch.bfloat16, torch.float32)


def test_the_faster_type_is_measured_once_for_a_processor_and_a_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = {torch.bfloat16: 1.0, torch.float32: 2.0}
    monkeypatch.setattr(compute, "_seconds_to_multiply", lambda dtype: took[dtype])
    monkeypatch.setattr(cycle, "processor", lambda: "a fast one")
    assert compute_dtype("auto", tmp_path) is torch.bfloat16
    took[torch.bfloat16] = 3.0  # another program has the processor now
    assert compute_dtype("auto", tmp_path) is torch.bfloat16
    monkeypatch.setattr(cycle, "processor", lambda: "another")
    assert compute_dtype("auto", tmp_path) is torch.float32
    kept = json.loads((tmp_path / "cache" / "compute.json").read_text())
    assert kept == {
        f"a fast one, torch {torch.__version__}": "bfloat16",
        f"another, torch {torch.__version__}": "float32",
    }


# Examples.


def test_only_the_completion_is_learned_and_each_label_is_the_next_token(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "ab", "completion": "cd$", "weight": 0.5}) + "\n")
    (one,) = read_examples(train, Characters())
    a, b, c, d = map(ord, "abcd")
    assert one.ids == (1, a, b, c, d, 2)
    assert one.labels == (IGNORED, IGNORED, c, d, 2, IGNORED)
    assert one.weight == 0.5
    assert one.learned == 3


def test_a_masked_end_of_turn_is_a_hard_error() -> None:
    good = example({"prompt": "a", "completion": "b$"}, Characters())
    check_end_of_turn([good], Characters())
    unfinished = example({"prompt": "a", "completion": "b"}, Characters())
    with pytest.raises(MaskedEndOfTurnError, match=r"line 2 .*<end_of_turn>"):
        check_end_of_turn([good, unfinished], Characters())
    masked = Example(good.ids, tuple(IGNORED if label == 2 else label for label in good.labels))
    with pytest.raises(MaskedEndOfTurnError, match="line 1"):
        check_end_of_turn([masked], Characters())
    with pytest.raises(MaskedEndOfTurnError, match="line 1"):
        check_end_of_turn([Example((1,), (IGNORED,))], Characters())


def test_padding_is_on_the_right_and_not_learned() -> None:
    made = padded([Example((5, 6), (6, IGNORED), 2.0), Example((7, 8, 9), (8, 9, IGNORED))])
    assert made.ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert made.places.tolist() == [0, 3, 4]
    assert made.labels.tolist() == [6, 8, 9]
    assert made.weights.tolist() == [2.0, 1.0, 1.0]


def test_packed_examples_share_a_row_without_padding_and_each_begins_at_its_own_start() -> None:
    made = packed([Example((5, 6), (6, IGNORED), 2.0), Example((7, 8, 9), (8, 9, IGNORED))])
    assert made.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert made.places.tolist() == [0, 2, 3]
    assert made.labels.tolist() == [6, 8, 9]
    assert made.weights.tolist() == [2.0, 1.0, 1.0]
    assert made.positions is not None and made.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert made.segments is not None and made.segments.tolist() == [[0, 0, 1, 1, 1]]


# The plan.


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    epochs=st.integers(1, 3),
    batch=st.integers(1, 8),
    budget=st.integers(1, 500),
    seed=st.integers(0, 9),
)
def test_a_plan_is_the_same_each_time_and_within_its_tokens(
    lengths: list[int], epochs: int, batch: int, budget: int, seed: int
) -> None:
    examples = [of_length(length) for length in lengths]
    plan = plan_steps(examples, epochs=epochs, batch_examples=batch, max_tokens=budget, seed=seed)
    assert plan == plan_steps(examples, epochs=epochs, batch_examples=batch, max_tokens=budget, seed=seed)
    tokens = sum(lengths[index] for step in plan for index in step)
    assert tokens <= budget or len(plan) == 1
    assert all(0 < len(step) <= batch for step in plan)


def test_each_pass_reads_every_example_once_in_an_order_of_its_own() -> None:
    plan = plan_steps([of_length(5)] * 10, epochs=2, batch_examples=4, max_tokens=1000, seed=1)
    first, second = ([index for step in steps for index in step] for steps in (plan[:3], plan[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_examples_of_like_length_share_a_step() -> None:
    examples = [of_length(length) for length in [10, 90] * 16]
    plan = plan_steps(examples, epochs=1, batch_examples=4, max_tokens=10_000, seed=1)
    assert all(len({len(examples[index]) for index in step}) == 1 for step in plan)


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
    most=st.integers(1, 100),
    packing=st.booleans(),
)
def test_microbatches_hold_every_example_once_within_their_tokens(
    lengths: list[int], most: int, packing: bool
) -> None:
    groups = grouped([of_length(length) for length in lengths], most, packing=packing)
    assert sorted(len(one) for group in groups for one in group) == sorted(lengths)
    for group in groups:
        taken = sum(map(len, group)) if packing else max(map(len, group)) * len(group)
        assert len(group) == 1 or taken <= most


def test_the_learning_rate_rises_and_then_falls_to_its_share() -> None:
    chosen = options(learning_rate=1.0, warmup_share=0.1, final_learning_rate_share=0.2)
    rates = [learning_rate(step, 100, chosen) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=0.01)


def test_one_step_has_a_learning_rate_too() -> None:
    assert learning_rate(0, 1, options(learning_rate=1.0)) == 1.0


# The loss.


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 2 * ROWS + 3), seed=st.integers(0, 99))
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 8, requires_grad=True)
    words = torch.randn(50, 8)
    labels, weights = torch.randint(0, 50, (rows,)), torch.rand(rows)
    plain = (torch.nn.functional.cross_entropy(hidden @ words.t(), labels, reduction="none") * weights).sum()
    (expected,) = torch.autograd.grad(plain, hidden)
    loss = label_loss(hidden, words, labels, weights)
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, 3 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_where_every_weight_is_trained_the_words_have_a_gradient_too(cap: float | None) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(ROWS + 5, 8, requires_grad=True)
    words = torch.randn(50, 8, requires_grad=True)
    labels, weights = torch.randint(0, 50, (ROWS + 5,)), torch.rand(ROWS + 5)
    logits = hidden @ words.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    plain = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    expected = torch.autograd.grad(plain, [hidden, words])
    loss = label_loss(hidden, words, labels, weights, cap)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for found, wanted in zip(torch.autograd.grad(loss, [hidden, words]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
