"""What training promises when memory is short, and that no way of cutting a step changes it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_gemma import tiny_base, tiny_config
from tests.unit.test_finetune import QUICK, cycle_of, recipe_file, weights
from training import adapted as adapted_module
from training import finetune, quantize, recipe, steps
from training.hardware import Applied, Hardware
from training.microbatch import masks, packed, padded
from training.tensors import IGNORED, Example
from training.world import World

KINDS = ("gemma3_text", "gemma2", "gemma3n_text")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def untouched_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.gguf").write_bytes(b"stands for the file that the base was made of")
    monkeypatch.setattr(finetune, "hugging_face_folder", lambda gguf, state_dir: base)


def options(**changes: Any) -> recipe.Recipe:
    return recipe.Recipe.model_validate(recipe.read().model_dump() | QUICK | changes)


def adapted(kind: str, attention: str = "sdpa", **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation=attention)
    run_as = Applied(attention, liger=False, compile=False, why_not={})
    made = adapted_module.Adapted(model, options(**changes), torch.float32, run_as)
    with torch.no_grad():  # an adapter that begins at zero would hide what it does
        for each in made.masters:
            each.add_(0.02 * torch.randn(each.shape, generator=torch.Generator().manual_seed(each.numel())))
    return made


def examples(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    random = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(6, 50, (length,), generator=random).tolist()
        labels = [IGNORED] * (length // 2) + ids[length // 2 + 1 :] + [IGNORED]
        made.append(Example(tuple(ids), tuple(labels), 0.5 + number))
    return made


# Packing.


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_are_learned_as_if_each_were_alone(kind: str) -> None:
    batch = examples([9, 30, 90, 17])  # one longer than the sliding window
    attention = "eager" if kind == "gemma2" else "sdpa"
    alone, together = adapted(kind, attention), adapted(kind, attention, packing=True)
    each = sum(alone.loss([one]) for one in batch)
    row = together.loss(batch)
    assert row.item() == pytest.approx(each.item(), rel=1e-5)
    each.backward()
    row.backward()
    for one, other in zip(alone.masters, together.masters, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_nothing_of_one_packed_example_reaches_another() -> None:
    made = adapted("gemma3_text", packing=True)
    first, second, other = examples([40, 70, 40])
    with torch.no_grad():
        before = made.hidden(packed([first, second]))
        after = made.hidden(packed([other, second]))
    assert not torch.equal(before[: first.learned], after[: first.learned])
    torch.testing.assert_close(before[first.learned :], after[first.learned :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_examples_are_learned_as_transformers_itself_would(kind: str) -> None:
    attention = "eager" if kind == "gemma2" else "sdpa"
    made = adapted(kind, attention)
    (one,) = examples([100])
    found = made.loss([one]) / one.weight
    logits = made.model(input_ids=torch.tensor([one.ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor(one.labels), ignore_index=IGNORED, reduction="sum"
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_mask_is_made_only_where_causality_alone_does_not_do() -> None:
    short, long = padded(examples([9, 5])), padded(examples([80]))
    assert masks(short, 64) == {"full_attention": None, "sliding_attention": None}
    made = masks(long, 64)
    assert made["full_attention"] is None and made["sliding_attention"] is not None
    assert made["sliding_attention"][0, 0, 70].nonzero().flatten().tolist() == list(range(7, 71))
    assert masks(long, None)["sliding_attention"] is None


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"microbatch_tokens": 40}])
def test_checkpointing_and_smaller_microbatches_learn_the_same(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    learned = []
    for name, changes in (("plain", {}), ("changed", change)):
        folder = tmp_path / name
        folder.mkdir()
        directory = cycle_of(folder)
        finetune.run(directory, tmp_path / "base.gguf", folder, recipe_file(folder, **changes))
        learned.append(weights(directory / "adapter"))
    for name, value in learned[0].items():
        torch.testing.assert_close(value, learned[1][name], rtol=5e-2, atol=5e-3)


# When memory runs out.


def an_allocation_that_fails() -> None:
    """PyTorch's allocator, asked for more than there is address space."""
    torch.empty(2**46, dtype=torch.float64)


class Card:
    """A device with room for `rows` x length tokens: a real allocation fails beyond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, error: Any = None) -> None:
        self.failed = 0
        learn = adapted_module.Adapted.loss

        def loss(made: Any, group: Sequence[Example]) -> torch.Tensor:
            if len(group) * max(map(len, group)) > tokens:
                self.failed += 1
                if error is not None:
                    raise error
                an_allocation_that_fails()
            return learn(made, group)

        monkeypatch.setattr(adapted_module.Adapted, "loss", loss)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_where_memory_runs_out_the_same_steps_are_taken_in_smaller_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    plain, small = tmp_path / "plain", tmp_path / "small"
    plain.mkdir()
    small.mkdir()
    whole = finetune.run(cycle_of(plain), tmp_path / "base.gguf", plain, recipe_file(plain))
    assert whole["out_of_memory"] == [] and whole["microbatch_tokens"] == 1024
    card = Card(monkeypatch, tokens=128, error=error)
    directory = cycle_of(small)
    cut = finetune.run(directory, tmp_path / "base.gguf", small, recipe_file(small))
    assert card.failed == len(cut["out_of_memory"]) >= 1
    assert cut["out_of_memory"][0]["step"] == 1  # and no later step fails again
    assert cut["out_of_memory"][0]["from_tokens"] == 1024
    assert cut["microbatch_tokens"] == cut["out_of_memory"][-1]["to_tokens"] <= 128
    assert cut["steps"] == whole["steps"]
    assert cut["loss_first"] == pytest.approx(whole["loss_first"], rel=1e-5)
    assert cut["loss_last"] == pytest.approx(whole["loss_last"], rel=1e-3)
    lines = [json.loads(line) for line in (directory / "adapter" / "training.jsonl").read_text().splitlines()]
    assert {line["microbatch_tokens"] for line in lines} == {cut["microbatch_tokens"]}
    first, second = weights(directory / "adapter"), weights(next(plain.glob("2*/adapter")))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=5e-2, atol=5e-3)


def test_what_fitted_is_known_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, tokens=128)
    directory, chosen = cycle_of(tmp_path), recipe_file(tmp_path)

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(directory, tmp_path / "base.gguf", tmp_path, chosen, kill)
    failed = card.failed
    found = finetune.run(directory, tmp_path / "base.gguf", tmp_path, chosen)
    assert card.failed == failed
    assert len(found["out_of_memory"]) == failed


def test_one_example_that_does_not_fit_ends_it_and_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, tokens=20)
    directory = cycle_of(tmp_path)
    with pytest.raises(steps.TooLittleMemoryError, match=r"one example .*gradient_checkpointing: true"):
        finetune.run(directory, tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path))
    assert not (directory / "adapter").exists()


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch, tokens=20, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        finetune.run(cycle_of(tmp_path), tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path))
    assert card.failed == 1


_LIMITED = """
import resource, sys, torch
from training.steps import memory_ran_out
have = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (have + 2**28, have + 2**28))
try:
    torch.ones(2**28)
except Exception as error:
    print(type(error).__name__, memory_ran_out(error))
try:
    bytearray(2**30)
except MemoryError as error:
    print(type(error).__name__, memory_ran_out(error))
"""


def test_a_process_at_its_limit_fails_in_the_way_that_is_known() -> None:
    done = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["RuntimeError", "True", "MemoryError", "True"]


# What the machine has.


class Cuda:
    def __init__(self, there: bool = True, capability: tuple[int, int] = (8, 6)) -> None:
        self._there, self._capability = there, capability

    def is_available(self) -> bool:
        return self._there

    def get_device_name(self) -> str:
        return "NVIDIA GeForce RTX 3090"

    def get_device_capability(self) -> tuple[int, int]:
        return self._capability


def test_without_a_gpu_the_accelerations_are_left_out_and_why_is_said(tmp_path: Path) -> None:
    found = finetune.run(
        cycle_of(tmp_path), tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path, liger=True, compile=True)
    )
    if not torch.cuda.is_available():
        assert (found["device"], found["attention"], found["liger"], found["compile"]) == (
            "cpu",
            "sdpa",
            False,
            False,
        )
        assert found["not_applied"] == dict.fromkeys(
            ("flash_attention_2", "liger", "compile"), "there is no GPU"
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "paged_adamw_8bit"}, "paged_adamw_8bit, which needs a GPU"),
        ({"attention": "flash_attention_2"}, "there is no GPU; set it to auto"),
    ],
)
def test_what_only_a_gpu_can_do_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=said):
        finetune.run(tmp_path / "nowhere", tmp_path / "none", tmp_path, recipe_file(tmp_path, **change))


@pytest.mark.parametrize(
    ("cuda", "packages", "expected", "why"),
    [
        (Cuda(), {"flash_attn", "liger_kernel", "triton"}, ("flash_attention_2", True, True), set()),
        (Cuda(), {"triton"}, ("sdpa", False, True), {"flash_attention_2", "liger"}),
        (
            Cuda(capability=(7, 5)),
            {"flash_attn"},
            ("sdpa", False, False),
            {"flash_attention_2", "liger", "compile"},
        ),
        (
            Cuda(there=False),
            {"flash_attn", "liger_kernel", "triton"},
            ("sdpa", False, False),
            {"flash_attention_2", "liger", "compile"},
        ),
    ],
)
def test_accelerations_apply_where_a_gpu_and_its_packages_are(
    cuda: Any, packages: set[str], expected: tuple[str, bool, bool], why: set[str]
) -> None:
    from training.hardware import applied

    hardware = Hardware.here(cuda, lambda name: name in packages or None)
    found = applied(options(liger=True, compile=True), hardware, capped_attention=False)
    assert (found.attention, found.liger, found.compile) == expected
    assert set(found.why_not) == why


def test_a_model_that_caps_its_attention_is_never_run_without_the_cap() -> None:
    from training.hardware import applied

    here = Hardware("", (0, 0), frozenset())
    assert applied(options(), here, capped_attention=True).attention == "eager"
    with pytest.raises(ValueError, match="set it to auto or eager"):
        applied(options(attention="sdpa"), here, capped_attention=True)


def test_the_paged_optimizer_and_the_kernels_are_the_libraries_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes
    from transformers import AutoModelForCausalLM
    from transformers.integrations import liger

    told: list[Any] = []
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda model, config: told.append(("liger", model)))
    model = AutoModelForCausalLM.from_config(tiny_config())
    monkeypatch.setattr(model.model, "compile", lambda **how: told.append(("compile", how)))
    run_as = Applied("sdpa", liger=True, compile=True, why_not={})
    made = adapted_module.Adapted(model, options(method="full"), torch.bfloat16, run_as)
    assert told == [("liger", model), ("compile", {"dynamic": True})]
    optimizer = steps.optimizer_of(made, options(optimizer="paged_adamw_8bit"))
    assert isinstance(optimizer, bitsandbytes.optim.PagedAdamW8bit)


# LoRA and full.


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_weights_can_be_adapted_or_trained_whole(
    tmp_path: Path, base: Path, method: str, dtype: str
) -> None:
    directory = cycle_of(tmp_path)
    chosen = recipe_file(
        tmp_path,
        method=method,
        compute_dtype=dtype,
        epochs=4,
        learning_rate=0.02 if method == "lora" else 0.002,
    )
    found = finetune.run(directory, tmp_path / "base.gguf", tmp_path, chosen)
    assert found["loss_last"] < found["loss_first"] - 0.1
    assert finetune.run(directory, tmp_path / "base.gguf", tmp_path, chosen) == found
    from transformers import AutoModelForCausalLM

    kept = {"adapter", "adapter_config"} if method == "lora" else {"config.json", "model.safetensors"}
    assert set(quantize.trained(directory / "adapter")) == kept
    quantize.merge(base, directory / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    assert merged.dtype is torch.bfloat16
    for name in ("q_proj", "down_proj"):
        one, other = (
            next(value for key, value in model.state_dict().items() if name in key)
            for model in (merged, fresh)
        )
        assert not torch.equal(one, other.to(torch.bfloat16))


def test_packed_weights_of_gemma_3n_stay_as_they_are_while_it_is_trained(tmp_path: Path) -> None:
    from training.adapted import load
    from training.qlora import linear4bits

    folder = tiny_base(tmp_path / "base", "gemma3n_text")
    made = load(folder, options(frozen_weights="nf4"), torch.float32, Hardware.here())
    packed_layers = linear4bits(made.model)
    before = [layer.weight.data.clone() for layer in packed_layers]
    assert len(before) > 4 * 7
    made.loss(examples([20, 30])).backward()  # type: ignore[no-untyped-call]
    assert all(
        torch.equal(layer.weight.data, kept) for layer, kept in zip(packed_layers, before, strict=True)
    )
    assert all(each.grad is not None for each in made.masters)


# Several processes.


def test_one_process_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.join()
    tensor = torch.ones(3)
    world.add([tensor])
    world.wait()
    world.leave()
    assert (world, tensor.tolist(), world.total(2.5, torch.device("cpu"))) == (World(0, 1), [1.0] * 3, 2.5)


def test_what_several_processes_have_is_added_up_as_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def twice(tensor: torch.Tensor) -> None:  # as if the other process had the same
        sent.append(len(tensor))
        tensor.mul_(2)

    monkeypatch.setattr("torch.distributed.all_reduce", twice)
    monkeypatch.setattr("torch.distributed.barrier", lambda: sent.append("barrier"))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: sent.append("left"))
    world = World(1, 2)
    tensors = [torch.ones(2, 3), torch.arange(2.0)]
    world.add(tensors)
    assert [each.tolist() for each in tensors] == [[[2.0] * 3] * 2, [0.0, 2.0]]
    assert world.total(1.5, torch.device("cpu")) == 3.0
    assert (world.share("abcde"), world.first) == (["b", "d"], False)
    world.wait()
    world.leave()
    assert sent == [8, 1, "barrier", "left"]


def test_the_launcher_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    class State:
        def __init__(self, cpu: bool) -> None:
            self.process_index, self.num_processes = 1, 4

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(accelerate, "PartialState", State)
    assert World.join() == World(1, 4)
