"""What a fine-tuning promises, on a Gemma 3 of a few thousand random weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny_gemma import tiny_base
from training import finetune, lease, recipe, steps
from training.hardware import Hardware
from training.tensors import MaskedEndOfTurnError

QUICK = {
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 0.02,
    "epochs": 2,
    "batch_examples": 4,
    "compute_dtype": "float32",
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def untouched_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"stands for the file that the base was made of")
    monkeypatch.setattr(finetune, "hugging_face_folder", lambda gguf, state_dir: base)
    yield gguf


def cycle_of(folder: Path, examples: int = 12, end: str = "<end_of_turn>") -> Path:
    dataset = folder / "20260101T000000Z" / "dataset"
    dataset.mkdir(parents=True)
    with (dataset / "train.jsonl").open("w") as file:
        for number in range(examples):
            prompt = f"<start_of_turn>user\nadd {number}<end_of_turn>\n<start_of_turn>model\n"
            line = {"prompt": prompt, "completion": '{"name": "add"}' + end, "weight": 1.0}
            file.write(json.dumps(line) + "\n")
    return dataset.parent


def recipe_file(folder: Path, **changes: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.read().model_dump() | QUICK | changes))
    return file


def tuned(folder: Path, **changes: Any) -> tuple[dict[str, Any], Path]:
    folder.mkdir(exist_ok=True)
    directory = cycle_of(folder)
    gguf = folder.parent / "base.gguf"
    found = finetune.run(directory, gguf, folder, recipe_file(folder, **changes))
    return found, directory / "adapter"


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    loaded: dict[str, torch.Tensor] = load_file(adapter / "adapter_model.safetensors")
    return loaded


def assert_same_weights(left: Path, right: Path) -> None:
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_loss_falls_and_every_step_is_written_down(tmp_path: Path) -> None:
    found, adapter = tuned(tmp_path / "a", epochs=8)
    lines = [json.loads(line) for line in (adapter / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert set(lines[0]) == {"step", "loss", "lr", "tokens_per_s", "memory_gb", "microbatch_tokens"}
    assert found["loss_first"] == lines[0]["loss"]
    assert found["loss_last"] == lines[-1]["loss"]
    assert found["loss_last"] < found["loss_first"] - 0.5
    assert found == json.loads((adapter / "finetune.json").read_text())
    assert yaml.safe_load((adapter / "config.yaml").read_text()) == found["config"]


def test_every_targeted_layer_has_a_part_in_the_adapter_that_peft_can_load(
    tmp_path: Path, base: Path
) -> None:
    _, adapter = tuned(tmp_path / "a")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    learned = weights(adapter)
    assert len(learned) == 2 * 7 * 2  # layers, targets, A and B
    assert all(each.dtype is torch.float32 and each.abs().sum() > 0 for each in learned.values())
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    assert merged.config.model_type == "gemma3_text"


def test_the_same_seed_gives_the_same_adapter_and_another_another(tmp_path: Path) -> None:
    (_, first), (_, again), (_, other) = (
        tuned(tmp_path / name, seed=seed) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert_same_weights(first, again)
    assert any(not torch.equal(weights(first)[name], weights(other)[name]) for name in weights(first))


def test_a_training_that_loses_the_gpu_stops_at_a_step_and_goes_on_to_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = tuned(tmp_path / "whole")
    folder = tmp_path / "lost"
    folder.mkdir()
    directory, chosen = cycle_of(folder), recipe_file(folder)
    until = tmp_path / "until"
    monkeypatch.setenv(lease.VARIABLE, str(until))
    lease.Until(float("inf"), float("inf")).write(until)

    def take_back(done: int, _: int) -> None:
        if done == 3:  # between two checkpoints
            until.unlink()

    with pytest.raises(lease.LeaseLostError, match="back after step 3 of 6; start the training again"):
        finetune.run(directory, tmp_path / "base.gguf", folder, chosen, take_back)
    monkeypatch.delenv(lease.VARIABLE)
    told: list[int] = []
    finetune.run(directory, tmp_path / "base.gguf", folder, chosen, lambda done, _: told.append(done))
    assert told[0] == 3
    assert_same_weights(whole, directory / "adapter")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_training_goes_on_to_the_same_adapter(tmp_path: Path, dropout: float) -> None:
    _, whole = tuned(tmp_path / "whole", dropout=dropout)
    folder = tmp_path / "killed"
    folder.mkdir()
    directory, chosen = cycle_of(folder), recipe_file(folder, dropout=dropout)

    def kill_in_the_fifth_step(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(directory, tmp_path / "base.gguf", folder, chosen, kill_in_the_fifth_step)
    assert not (directory / "adapter").exists()
    begun: list[int] = []
    finetune.run(directory, tmp_path / "base.gguf", folder, chosen, lambda done, total: begun.append(done))
    assert begun[0] == 4  # the last checkpoint
    assert_same_weights(whole, directory / "adapter")
    lines = (directory / "adapter" / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert not (directory / "adapter.partial").exists()


def test_a_checkpoint_of_other_inputs_is_thrown_away(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    directory = cycle_of(folder)

    def kill_after_a_checkpoint(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(
            directory, tmp_path / "base.gguf", folder, recipe_file(folder, seed=1), kill_after_a_checkpoint
        )
    begun: list[int] = []
    finetune.run(
        directory,
        tmp_path / "base.gguf",
        folder,
        recipe_file(folder, seed=2),
        lambda done, total: begun.append(done),
    )
    assert begun[0] == 0


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    found, adapter = tuned(tmp_path / "a")
    before = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    directory = adapter.parent

    def watched(done: int, total: int) -> None:
        raise AssertionError("it trains again")

    again = finetune.run(
        directory, tmp_path / "base.gguf", tmp_path / "a", tmp_path / "a" / "recipe.yaml", watched
    )
    assert again == found
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_packed_and_unpacked_nf4_weights_teach_the_same(tmp_path: Path) -> None:
    (packed, first), (unpacked, second) = (
        tuned(tmp_path / kind, frozen_weights=kind) for kind in ("nf4", "dequantized")
    )
    assert packed["loss_first"] == pytest.approx(unpacked["loss_first"], rel=1e-3)
    for name, value in weights(first).items():
        torch.testing.assert_close(value, weights(second)[name], rtol=0.05, atol=5e-3)


def test_packed_weights_are_never_repacked_by_a_forward_in_eval_mode(base: Path) -> None:
    from training.adapted import load
    from training.qlora import linear4bits
    from training.tensors import Example

    options = recipe.Recipe.model_validate(recipe.read().model_dump() | QUICK | {"frozen_weights": "nf4"})
    adapted = load(base, options, torch.bfloat16, Hardware.here())
    layers = linear4bits(adapted.model)
    assert len(layers) == 14
    before = [layer.weight.data.clone() for layer in layers]
    adapted.model.eval()
    with torch.no_grad():
        adapted.loss([Example((2, 7, 8, 5), (7, 8, 5, -100))])
    assert all(torch.equal(layer.weight.data, kept) for layer, kept in zip(layers, before, strict=True))


def test_weights_of_examples_count(tmp_path: Path) -> None:
    folder = tmp_path / "weighted"
    folder.mkdir()
    directory = cycle_of(folder)
    train = directory / "dataset" / "train.jsonl"
    lines = [json.loads(line) for line in train.read_text().splitlines()]
    train.write_text("".join(json.dumps(line | {"weight": 3.0}) + "\n" for line in lines))
    threefold = finetune.run(directory, tmp_path / "base.gguf", folder, recipe_file(folder))
    plain, _ = tuned(tmp_path / "plain")
    assert threefold["loss_first"] == pytest.approx(plain["loss_first"], rel=1e-4)


def test_an_answer_without_its_end_of_turn_stops_the_training(tmp_path: Path) -> None:
    directory = cycle_of(tmp_path, end="")
    with pytest.raises(MaskedEndOfTurnError, match="line 1"):
        finetune.run(directory, tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path))
    assert not (directory / "adapter").exists()


def test_examples_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    directory = cycle_of(tmp_path)
    train = directory / "dataset" / "train.jsonl"
    long = {"prompt": "a" * 200, "completion": "b<end_of_turn>", "weight": 1.0}
    train.write_text(train.read_text() + json.dumps(long) + "\n")
    found = finetune.run(directory, tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path, max_length=100))
    assert (found["examples"], found["examples_too_long"]) == (12, 1)


def test_a_short_night_reads_fewer_tokens_than_the_recipe_allows_and_never_more(tmp_path: Path) -> None:
    directory, gguf = cycle_of(tmp_path), tmp_path / "base.gguf"
    recipe_of = recipe_file(tmp_path, max_tokens=2000)
    short = finetune.run(directory, gguf, tmp_path, recipe_of, max_tokens=500)
    assert short["config"]["max_tokens"] == 500 and short["tokens"] <= 500
    whole = finetune.run(directory, gguf, tmp_path, recipe_of, max_tokens=10**9)
    assert whole["config"]["max_tokens"] == 2000 and whole["tokens"] > short["tokens"]


def test_no_example_that_fits_is_said(tmp_path: Path) -> None:
    directory = cycle_of(tmp_path)
    with pytest.raises(finetune.NothingToTrainError, match="12 examples, none within max_length"):
        finetune.run(directory, tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path, max_length=8))


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    directory = cycle_of(tmp_path)
    with pytest.raises(steps.LossNotFiniteError, match="learning_rate"):
        finetune.run(
            directory,
            tmp_path / "base.gguf",
            tmp_path,
            recipe_file(tmp_path, learning_rate=1e30, epochs=9, clip_gradient=1e30),
        )


def test_a_missing_training_set_is_named(tmp_path: Path) -> None:
    directory = cycle_of(tmp_path)
    shutil.rmtree(directory / "dataset")
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        finetune.run(directory, tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path))
