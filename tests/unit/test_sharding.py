"""What training promises of a model that is divided (FSDP); several processes: tests/integration."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny_gemma import tiny_base, tiny_config
from tests.unit.test_finetune import recipe_file
from tests.unit.test_training_memory import examples, options
from training import finetune, hardware, lease, steps
from training.checkpoint import Checkpoint, History
from training.hardware import Hardware, HardwareError
from training.world import World

EXAMPLES = examples([20, 31, 44, 25, 38, 29])


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of this process alone: all that several do, but for the others' answers."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny_base(folder / kind, kind) for kind in ("gemma3_text", "gemma3n_text")}


def learned(
    folder: Path, base: Path, *, stop_after: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[History, dict[str, torch.Tensor]]:
    """The history of a training in `folder`, where it goes on from a checkpoint, and what it saved."""
    from safetensors.torch import load_file

    from training.adapted import load

    chosen = options(**{"epochs": 3, "batch_examples": 2, "microbatch_tokens": 48} | changes)
    made = load(base, chosen, dtype, Hardware.here())

    def stop(done: int, _: int) -> None:
        if stop_after and done == stop_after:
            raise KeyboardInterrupt

    history = steps.train_adapter(made, EXAMPLES, chosen, Checkpoint(folder, "float32"), stop)
    assert made.gathered(keep=False) in (None, {})
    made.save(folder, made.gathered(keep=True))
    (saved,) = folder.glob("*.safetensors")
    return history, load_file(saved)


def losses(history: History) -> list[float]:
    return [line["loss"] for line in history.lines]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: Any) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype is other[name].dtype
        torch.testing.assert_close(value, other[name], **tolerance)


def test_a_divided_model_learns_what_a_whole_one_does_and_goes_on_from_its_checkpoint(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    base = bases["gemma3_text"]
    changes: dict[str, Any] = {"epochs": 1, "checkpoint_steps": 1, "frozen_weights": "nf4"}
    history, whole = learned(tmp_path / "whole", base, **changes)
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "killed", base, sharding="fsdp", stop_after=2, **changes)
    divided_history, divided = learned(tmp_path / "killed", base, sharding="fsdp", **changes)
    assert len(history.lines) == 3
    assert losses(divided_history) == pytest.approx(losses(history), rel=1e-5)
    assert_same(whole, divided, rtol=1e-3, atol=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize(
    "changes",
    [
        {"frozen_weights": "dequantized", "gradient_checkpointing": True},
        {"method": "full", "learning_rate": 0.002},
        {"kind": "gemma3n_text", "frozen_weights": "nf4"},
    ],
)
def test_however_it_is_trained_a_divided_model_learns_and_saves_what_a_whole_one_does(
    tmp_path: Path, bases: dict[str, Path], changes: dict[str, Any]
) -> None:
    base = bases[changes.pop("kind", "gemma3_text")]
    history, whole = learned(tmp_path / "whole", base, **changes)
    divided_history, divided = learned(tmp_path / "divided", base, sharding="fsdp", **changes)
    assert losses(divided_history) == pytest.approx(losses(history), rel=1e-5)
    assert losses(history)[-1] < losses(history)[0]
    assert_same(whole, divided, rtol=1e-3, atol=1e-5)
    if changes.get("method") == "full":
        config = json.loads((tmp_path / "divided" / "config.json").read_text())
        assert config == json.loads((tmp_path / "whole" / "config.json").read_text())


@pytest.mark.soak
def test_a_divided_model_computes_in_the_type_that_a_whole_one_does(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    changes: dict[str, Any] = {"dtype": torch.bfloat16, "frozen_weights": "nf4"}
    history, whole = learned(tmp_path / "whole", bases["gemma3_text"], **changes)
    divided_history, divided = learned(tmp_path / "divided", bases["gemma3_text"], sharding="fsdp", **changes)
    assert losses(divided_history) == pytest.approx(losses(history), rel=0.01)
    assert {each.dtype for each in divided.values()} == {torch.float32}
    assert divided.keys() == whole.keys()


def test_the_embeddings_of_every_layer_are_gathered_by_themselves() -> None:
    from transformers import AutoModelForCausalLM

    from training.sharding import parts

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(tiny_config("gemma3n_text"))
    *layers, beside = parts(causal)
    assert layers == list(causal.model.layers)
    assert beside is causal.model.embed_tokens_per_layer


@pytest.mark.soak
@pytest.mark.parametrize(("first", "then"), [("none", "fsdp"), ("fsdp", "none")])
def test_a_checkpoint_is_in_one_piece_so_that_any_number_of_processes_goes_on_from_it(
    tmp_path: Path, bases: dict[str, Path], first: str, then: str
) -> None:
    base = bases["gemma3_text"]
    whole_history, whole = learned(tmp_path / "whole", base)
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "killed", base, sharding=first, stop_after=5)
    history, resumed = learned(tmp_path / "killed", base, sharding=then)
    assert losses(history) == pytest.approx(losses(whole_history), rel=1e-5)
    assert_same(whole, resumed, rtol=1e-3, atol=1e-5)


def test_each_process_has_as_many_microbatches_of_a_divided_model_and_what_is_added_weighs_nothing() -> None:
    groups = [[one] for one in EXAMPLES[:3]]
    even = steps._as_many_for_each(groups, World(0, 2))
    assert even[:3] == groups
    assert [(one.ids, one.weight) for one in even[3]] == [(EXAMPLES[0].ids, 0.0)]
    assert [len(World(rank, 2).share(even)) for rank in (0, 1)] == [2, 2]
    assert steps._as_many_for_each(groups, World(0, 3)) == groups


def test_memory_that_runs_out_while_a_divided_model_computes_is_remembered_for_the_next_start(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.adapted import Adapted

    plain = Adapted.loss

    def short(self: Adapted, group: Any) -> torch.Tensor:
        if len(group) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, group)

    monkeypatch.setattr(Adapted, "loss", short)
    base = bases["gemma3_text"]
    changes: dict[str, Any] = {"sharding": "fsdp", "microbatch_tokens": 50, "method": "full"}
    told = "memory ran out in process 0 of 1.*Start them again.*checkpoint, with microbatches of 25"
    with pytest.raises(steps.StartAgainError, match=told):
        learned(tmp_path / "short", base, epochs=1, **changes)
    history, _ = learned(tmp_path / "short", base, epochs=1, **changes)
    assert history.microbatch_tokens == 25 and len(history.lines) == 3
    assert [(cut["from_tokens"], cut["to_tokens"]) for cut in history.halved] == [(50, 25)]
    assert json.loads((tmp_path / "short" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_lease_that_is_over_for_one_process_is_over_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Another(World):
        def total(self, value: float, device: torch.device) -> float:
            return value + 1.0

    class Here:
        device = torch.device("cpu")

    here: Any = Here()
    monkeypatch.delenv(lease.VARIABLE, raising=False)
    assert not steps._lease_over(here, Another())
    monkeypatch.setenv(lease.VARIABLE, "until")
    monkeypatch.setattr(lease, "over", lambda: False)
    assert steps._lease_over(here, Another()) and not steps._lease_over(here, World())


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({"sharding": "fsdp"}, 1, "sharding is fsdp.* there is one; start them with accelerate launch"),
        (
            {"sharding": "fsdp", "optimizer": "paged_adamw_8bit"},
            2,
            "optimizer is paged_adamw_8bit.*set it to adamw",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_to_set(
    changes: dict[str, Any], processes: int, said: str
) -> None:
    with pytest.raises(HardwareError, match=said):
        hardware.check_sharding(options(**changes), processes)


def test_a_launcher_that_was_told_of_fsdp_and_a_recipe_that_was_not_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HardwareError, match="accelerate was told to use FSDP, but sharding is none"):
        hardware.check_sharding(options(), 2)
    hardware.check_sharding(options(sharding="fsdp"), 2)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    hardware.check_sharding(options(), 2)


def test_one_process_alone_does_not_begin_to_divide_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    directory = tmp_path / "20260101T000000Z"
    (directory / "dataset").mkdir(parents=True)
    (directory / "dataset" / "train.jsonl").write_text("")
    (tmp_path / "base.gguf").write_bytes(b"base")
    with pytest.raises(HardwareError, match="and there is one"):
        finetune.run(directory, tmp_path / "base.gguf", tmp_path, recipe_file(tmp_path, sharding="fsdp"))
    assert sorted(path.name for path in directory.iterdir()) == ["dataset"]


def test_layers_that_are_gathered_are_not_compiled() -> None:
    here = Hardware("a GPU", (9, 0), frozenset({"triton"}))
    found = hardware.applied(options(compile=True, sharding="fsdp"), here, capped_attention=False)
    assert not found.compile and "sharding is fsdp" in found.why_not["compile"]
