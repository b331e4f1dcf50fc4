"""What the memory planner promises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.tiny_gemma import tiny_config
from training import plan, plan_cli, recipe
from training.__main__ import app
from training.memory import PARTS, Load, step_memory

GIB = 2**30
LAYERS = 3
RECIPES = sorted(recipe.CONFIGS.glob("gemma*.yaml"))
runner = CliRunner()


def options(**changes: Any) -> recipe.Recipe:
    return recipe.Recipe.model_validate(recipe.read().model_dump() | changes)


def tiny(**changes: Any) -> Any:
    return tiny_config(words=4096, num_hidden_layers=LAYERS, **changes)


LOAD = Load(2, 64, 16)


def need(load: Load = LOAD, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, int]:
    return step_memory(tiny(), options(**changes), load, dtype, "sdpa").parts


def room(free: int) -> plan.Memory:
    return plan.Memory(free, runtime=0)


# What a step takes.


def test_weights_are_counted_to_the_byte() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny(), dtype=torch.float32)
    held = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
    assert need()["weights"] == pytest.approx(sum(held.values()), abs=1024)
    assert need(dtype=torch.bfloat16)["weights"] == pytest.approx(sum(held.values()) / 2, abs=1024)


def test_packed_weights_take_half_a_byte_and_a_share_of_a_scale() -> None:
    plain, packed = need(), need(frozen_weights="nf4")
    linear = LAYERS * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plain["weights"] - packed["weights"] == linear * 4 - linear // 2 - linear // 64 * 4


def test_the_optimizer_holds_two_moments_of_what_is_trained() -> None:
    pairs = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    trained = LAYERS * 4 * sum(16 * (read + written) for read, written in pairs)  # bytes, at rank 16
    assert need()["optimizer"] == pytest.approx(2 * trained, rel=0.05)
    assert need(optimizer="paged_adamw_8bit")["optimizer"] == pytest.approx(trained / 2, rel=0.05)


def test_activations_grow_with_the_microbatch_and_shrink_with_checkpointing() -> None:
    small, large = need(Load(8, 128, 16)), need(Load(16, 128, 16))
    assert large["activations"] == pytest.approx(2 * small["activations"], rel=0.05)
    again = need(Load(8, 128, 16), gradient_checkpointing=True)
    assert again["activations"] < small["activations"] / 2
    assert sum(again.values()) < sum(small.values())


def test_every_weight_has_gradients_and_moments_where_every_one_is_trained() -> None:
    full = need(method="full")
    assert full["optimizer"] == pytest.approx(2 * full["weights"], rel=0.01)
    assert sum(full.values()) > sum(need().values()) + 2.5 * full["weights"]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_each_kind_of_gemma_can_be_reckoned(kind: str, checkpointing: bool) -> None:
    attention = "eager" if kind == "gemma2" else "flash_attention_2"
    found = step_memory(
        tiny_config(kind),
        options(gradient_checkpointing=checkpointing, frozen_weights="nf4"),
        Load(2, 64, 16),
        torch.bfloat16,
        attention,
    )
    assert tuple(found.parts) == PARTS
    assert all(found.parts[part] > 0 for part in ("weights", "adapter", "optimizer", "activations"))
    assert found.total == sum(found.parts.values())


def test_what_a_divided_model_is_made_of_is_divided_and_what_is_gathered_is_not() -> None:
    whole = need(frozen_weights="nf4", dtype=torch.bfloat16)
    found = {
        processes: step_memory(
            tiny(),
            options(frozen_weights="nf4", sharding="fsdp"),
            LOAD,
            torch.bfloat16,
            "sdpa",
            processes=processes,
        ).parts
        for processes in (2, 4)
    }
    scales = LAYERS * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128) // 64 * 4  # of packed weights: each has all
    divided = {processes: parts["weights"] - scales for processes, parts in found.items()}
    assert divided[2] == pytest.approx((whole["weights"] - scales) / 2, abs=1024)
    assert divided[4] == pytest.approx(divided[2] / 2, abs=1024)
    for part in ("adapter", "optimizer"):
        assert found[4][part] == pytest.approx(found[2][part] / 2, rel=0.01)
    for part in ("activations", "logits", "workspace"):
        assert found[4][part] == pytest.approx(found[2][part], rel=0.02)
    words = 4096 * 64 * 2
    assert found[2]["workspace"] >= words  # embeddings stay for a whole microbatch


def test_of_a_divided_model_every_weight_may_be_trained_and_each_process_moves_its_part() -> None:
    parts = {
        processes: step_memory(
            tiny(), options(method="full", sharding="fsdp"), LOAD, torch.bfloat16, "sdpa", processes=processes
        ).parts
        for processes in (2, 4)
    }
    whole = need(method="full")["weights"]  # float32
    assert parts[2]["adapter"] == pytest.approx(2 * whole / 2, rel=0.01)  # originals and gradients
    assert parts[4]["optimizer"] == pytest.approx(2 * whole / 4, rel=0.01)


# What is chosen.


def made(free: int, **changes: Any) -> plan.Plan:
    chosen = options(**{"batch_examples": 8, "max_length": 512, "frozen_weights": "nf4"} | changes)
    return plan.make(tiny(), chosen, room(free), "sdpa")


def total(cut: plan.Cut) -> int:
    chosen = options(gradient_checkpointing=cut.gradient_checkpointing, frozen_weights="nf4")
    load = Load(cut.microbatch_examples, cut.max_length, cut.max_length - 1)
    return step_memory(tiny(), chosen, load, torch.bfloat16, "sdpa").total


def test_with_room_for_all_nothing_is_given_up() -> None:
    found = made(64 * GIB)
    assert found.cut == plan.Cut(8, False, 512)
    assert found.accumulation == 1 and found.advice == []


def test_a_microbatch_is_halved_until_it_fits_and_accumulation_makes_up_for_it() -> None:
    free = total(plan.Cut(4, False, 512)) + 1
    found = made(free)
    assert found.cut == plan.Cut(4, False, 512)
    assert found.accumulation * found.cut.microbatch_examples == 8
    assert found.need.total <= free


def test_activations_are_computed_again_where_few_examples_would_fit_otherwise() -> None:
    free = total(plan.Cut(1, False, 512)) + 1
    found = made(free)
    assert found.cut is not None and found.cut.gradient_checkpointing
    assert found.cut.max_length == 512


def test_examples_are_shortened_last() -> None:
    free = total(plan.Cut(1, True, 256)) + 1
    found = made(free)
    assert found.cut == plan.Cut(1, True, 256)
    assert "longer than 256 tokens are left out" in found.advice[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "full"}, "method: lora"),
        ({"frozen_weights": "dequantized"}, "nf4"),
        ({"method": "lora"}, "qlora"),
    ],
)
def test_where_nothing_fits_it_says_what_would(changes: dict[str, Any], said: str) -> None:
    chosen = options(max_length=256, **changes)
    found = plan.make(tiny(), chosen, plan.Memory(2**20, in_use=2**19, runtime=0), "sdpa")
    assert found.cut is None and found.accumulation == 0
    assert "more would do" in found.advice[0]
    assert any(said in line for line in found.advice)
    assert any("another process holds" in line for line in found.advice)


# The recipes, and the command.


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_loads_and_names_a_shape_that_there_is(file: Path) -> None:
    loaded = recipe.read(file)
    assert loaded.model == file.stem
    assert plan.shape(loaded.model).hidden_size > 0
    assert list(yaml.safe_load(file.read_text())) == list(recipe.Recipe.model_fields)
    assert f"--config training/configs/{file.name}" in file.read_text() or file == recipe.DEFAULT


def parameters(model: str) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(plan.shape(model))
    return sum(each.numel() for each in whole.parameters())


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("gemma3-270m", 268),
        ("gemma3-1b", 1000),
        ("gemma3-4b", 3880),
        ("gemma2-2b", 2614),
        ("gemma3n-e4b", 6869),
    ],
)
def test_the_shapes_have_as_many_parameters_as_the_models(model: str, millions: int) -> None:
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(made)
    return str(made)


def asked(*words: str) -> Any:
    return runner.invoke(app, ["plan", *words])


def test_the_command_explains_itself_and_prints_json(folder: str) -> None:
    done = asked("--model-folder", folder, "--gpu-memory", "8GiB")
    assert done.exit_code == 0, done.output
    assert "Fits: 8 at a time, 1 times a step" in done.stdout
    assert all(part in done.stdout for part in PARTS)
    words = ("--gpu-memory", "8GiB", "--in-use", "1 GiB", "--batch", "4", "--json")
    done = asked("--model-folder", folder, *words)
    found = json.loads(done.stdout)
    assert found["fits"] and found["microbatch_examples"] * found["accumulation"] == 4
    assert found["memory"]["in_use"] == GIB
    assert sum(found["need"][part] for part in PARTS) == found["need"]["total"] < 2**29
    assert recipe.Recipe.model_validate(recipe.read().model_dump() | found["recipe"])


def test_the_command_plans_for_several_gpus(folder: str, tmp_path: Path) -> None:
    divided = tmp_path / "divided.yaml"
    divided.write_text(yaml.safe_dump(recipe.read().model_dump() | {"sharding": "fsdp", "max_length": 64}))
    words = ("--model-folder", folder, "--gpu-memory", "8GiB", "--config", str(divided))
    done = asked(*words, "--processes", "2")
    assert done.exit_code == 0, done.output
    assert "Fits: 4 at a time, 1 times a step in each of 2 processes" in done.stdout
    done = asked(*words)
    assert done.exit_code == 1 and "sharding is fsdp" in done.stderr and "there is one" in done.stderr


def test_the_command_ends_with_1_where_nothing_fits(folder: str) -> None:
    done = asked("--model-folder", folder, "--gpu-memory", "700MiB")
    assert done.exit_code == 1
    assert "Nothing fits" in done.stdout and "would do" in done.stdout


@pytest.mark.parametrize("words", ["", "a lot", "-1GiB", "1e9", "24 GiBs", "9" * 400, "1\0GiB"])
def test_what_is_no_size_is_refused(words: str) -> None:
    assert asked("--gpu-memory", words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "bytes_"),
    [("24GiB", 24 * GIB), ("24", 24), ("5.8 gib", int(5.8 * GIB)), ("1GB", 10**9), ("512MiB", 2**29)],
)
def test_sizes_have_units(words: str, bytes_: int) -> None:
    assert plan_cli.size(words) == bytes_


def test_without_a_gpu_its_memory_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = asked()
    assert done.exit_code == 1 and "give --gpu-memory" in done.stderr


def test_a_gpu_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * GIB, 8 * GIB))
    memory = plan_cli._memory(None, None, 0.5)
    assert (memory.total, memory.in_use, memory.margin) == (8 * GIB, 2 * GIB, 4 * GIB)
    assert plan_cli._memory(None, "1GiB", 0).in_use == GIB


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "abacus"}', '{"hidden_size": 3}', "\0"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, content: str) -> None:
    done = asked("--gpu-memory", "8GiB", "--model-folder", str(tmp_path))
    assert done.exit_code == 1 and "there is no" in done.stderr
    (tmp_path / "config.json").write_text(content)
    done = asked("--gpu-memory", "8GiB", "--model-folder", str(tmp_path))
    assert done.exit_code == 1 and "not a model's configuration" in done.stderr


@pytest.mark.soak
def test_gemma_3n_fits_a_card_of_24_gib_of_which_another_process_holds_5_8() -> None:
    chosen = recipe.read(recipe.CONFIGS / "gemma3n-e4b.yaml")
    memory = plan.Memory(24 * GIB, int(5.8 * GIB), int(24 * GIB * plan_cli.MARGIN))
    shape = plan.shape(chosen.model)
    whole = chosen.model_copy(update={"gradient_checkpointing": False})
    found = plan.make(shape, whole, memory, "sdpa")
    assert found.cut is not None
    assert found.accumulation * found.cut.microbatch_examples == chosen.batch_examples == 16
    assert found.cut.max_length == chosen.max_length
    sixteen = step_memory(
        shape, whole, Load(16, chosen.max_length, chosen.max_length - 1), torch.bfloat16, "sdpa"
    )
    assert sixteen.total > memory.total
    assert plan.settings(found.cut).items() <= chosen.model_dump().items()
