"""Several processes train as one, with Gloo, started by what `accelerate launch` uses for GPUs."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.tiny_gemma import tiny_base
from tests.unit.test_finetune import cycle_of, recipe_file, weights
from training import cycle
from training.world import World

LAUNCH = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", "training")


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2)
    tensors = [torch.full((2, 3), rank + 1.0), torch.tensor([10.0 * rank])]
    world.add(tensors)
    world.add([])
    total = world.total(rank + 0.5, torch.device("cpu"))
    world.wait()
    Path(folder, str(rank)).write_text(
        f"{tensors[0].tolist()} {tensors[1].tolist()} {total} {world.share('abcde')} {world.first}"
    )
    world.leave()


@pytest.mark.soak
def test_two_processes_add_up_and_share_by_turns(tmp_path: Path) -> None:
    spawn(_one_of_two, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    same = "[[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]] [10.0] 2.0"
    assert (tmp_path / "0").read_text() == f"{same} ['a', 'c', 'e'] True"
    assert (tmp_path / "1").read_text() == f"{same} ['b', 'd'] False"


@pytest.mark.soak
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"stands for the file that the base was made of")
    kept = tmp_path / "state" / "cache" / "hf" / hashlib.sha256(gguf.read_bytes()).hexdigest()
    kept.mkdir(parents=True)
    tiny_base(kept)
    adapters = []
    for name, launcher in (("one", ("training",)), ("two", LAUNCH)):
        folder = tmp_path / name
        folder.mkdir()
        directory = cycle_of(folder, examples=8)
        chosen = recipe_file(folder, epochs=1, microbatch_tokens=64)
        subprocess.run(
            [
                *(sys.executable, "-m", *launcher, "finetune", "--cycle", directory, "--config", chosen),
                *("--state-dir", tmp_path / "state", "--base-gguf", gguf),
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        found = cycle.read_json(directory / "adapter" / "finetune.json")
        assert (found["processes"], found["steps"]) == (1 if name == "one" else 2, 2)
        adapters.append((found, weights(directory / "adapter")))
    (one, alone), (two, together) = adapters
    assert two["loss_first"] == pytest.approx(one["loss_first"], rel=1e-5)
    for name, value in alone.items():
        torch.testing.assert_close(value, together[name], rtol=1e-2, atol=1e-4)
