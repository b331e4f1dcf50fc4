"""Several processes train as one, with Gloo, started by what `accelerate launch` uses for GPUs."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from tests.tiny_gemma import tiny_base
from tests.unit.test_finetune import cycle_of, recipe_file, weights
from training import cycle, finetune
from training.world import ProcessLostError, World

ACCELERATE = (
    *("accelerate.commands.launch", "--use_fsdp", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    *("--module", "training"),
)
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


def _the_second_dies(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2)
    world.wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ProcessLostError) as lost:
        world.total(1.0, torch.device("cpu"))
    Path(folder, "lost").write_text(str(lost.value))


@pytest.mark.soak
def test_a_process_whose_companion_was_killed_says_so_and_what_to_do(tmp_path: Path) -> None:
    context = spawn(_the_second_dies, (str(tmp_path),), nprocs=2, join=False)  # type: ignore[no-untyped-call]
    for process in context.processes:
        process.join(240)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL]
    assert re.fullmatch(
        r"process 0 of 2 lost another that trains with it \(\w+\); that one's own output says why\."
        r" Start them again: they go on from the last checkpoint",
        (tmp_path / "lost").read_text(),
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that holds a tiny base, converted already, of `base.gguf` beside it."""
    folder = tmp_path_factory.mktemp("state")
    gguf = folder / "base.gguf"
    gguf.write_bytes(b"stands for the file that the base was made of")
    kept = folder / "cache" / "hf" / hashlib.sha256(gguf.read_bytes()).hexdigest()
    kept.mkdir(parents=True)
    tiny_base(kept)
    return folder


def _launched(
    directory: Path, recipe: Path, state: Path, launch: tuple[str, ...] = LAUNCH
) -> "subprocess.Popen[str]":
    """Two processes that train together, as they are started for two GPUs."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", *launch, "finetune", "--cycle", str(directory)),
            *("--config", str(recipe), "--state-dir", str(state), "--base-gguf", str(state / "base.gguf")),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.soak
@pytest.mark.timeout(1200)  # they import transformers and peft anew; on a busy machine that takes minutes
def test_two_processes_learn_what_one_does(tmp_path: Path, state: Path) -> None:
    adapters = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        directory = cycle_of(folder, examples=9)  # of one step there is nothing for the second process
        chosen = recipe_file(folder, epochs=2, microbatch_tokens=64)
        if name == "one":
            finetune.run(directory, state / "base.gguf", state, chosen)
        else:
            together = _launched(directory, chosen, state)
            _, said = together.communicate()
            assert together.returncode == 0, said
        found = cycle.read_json(directory / "adapter" / "finetune.json")
        assert (found["processes"], found["steps"]) == (1 if name == "one" else 2, 6)
        lines = (directory / "adapter" / "training.jsonl").read_text().splitlines()
        adapters.append(([json.loads(line)["loss"] for line in lines], weights(directory / "adapter")))
    (losses, alone), (of_two, together_learned) = adapters
    assert of_two == pytest.approx(losses, rel=1e-4)
    for tensor, value in alone.items():
        torch.testing.assert_close(value, together_learned[tensor], rtol=1e-2, atol=1e-4)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_killed_process_ends_the_other_and_the_launcher_says_which_and_how(
    tmp_path: Path, state: Path
) -> None:
    directory = cycle_of(tmp_path, examples=8)
    launcher = _launched(directory, recipe_file(tmp_path, epochs=2000, checkpoint_steps=1), state)
    said, second = _killed_after_a_checkpoint(launcher, directory)
    assert f"Signal 9 (SIGKILL) received by PID {second}" in said


def _killed_after_a_checkpoint(launcher: "subprocess.Popen[str]", directory: Path) -> tuple[str, int]:
    """Kill the second process; what the launcher said when all were gone, and the pid."""
    workers: list[psutil.Process] = []
    try:
        while not (directory / "adapter.partial" / "state.pt").is_file():
            assert launcher.poll() is None, launcher.communicate()[1]
            time.sleep(0.02)
        workers = psutil.Process(launcher.pid).children()
        second = next(worker for worker in workers if worker.environ().get("RANK") == "1")
        second.kill()
        _, said = launcher.communicate(timeout=600)
        assert launcher.returncode == 1, said
        assert not any(worker.is_running() for worker in workers)
        assert not (directory / "adapter").exists()
        return said, second.pid
    finally:
        launcher.kill()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "changes", [{"frozen_weights": "nf4"}, {"method": "full", "learning_rate": 0.002}], ids=["nf4", "full"]
)
def test_a_model_divided_by_accelerate_learns_what_one_process_does_though_it_was_killed(
    tmp_path: Path, state: Path, changes: dict[str, Any]
) -> None:
    found, learned = [], []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        directory = cycle_of(folder, examples=9)
        more = {"sharding": "fsdp"} if name == "two" else {}
        chosen = recipe_file(folder, epochs=10, microbatch_tokens=64, checkpoint_steps=1, **changes, **more)
        if name == "one":
            finetune.run(directory, state / "base.gguf", state, chosen)
        else:
            _killed_after_a_checkpoint(_launched(directory, chosen, state, ACCELERATE), directory)
            again = _launched(directory, chosen, state, ACCELERATE)
            _, said = again.communicate()
            assert again.returncode == 0, said
        found.append(cycle.read_json(directory / "adapter" / "finetune.json"))
        lines = (directory / "adapter" / "training.jsonl").read_text().splitlines()
        (saved,) = (directory / "adapter").glob("*.safetensors")
        learned.append(([json.loads(line)["loss"] for line in lines], load_file(saved)))
    assert [(each["processes"], each["steps"]) for each in found] == [(1, 30), (2, 30)]
    (losses, alone), (of_two, together) = learned
    assert of_two == pytest.approx(losses, rel=1e-3)
    assert alone.keys() == together.keys()
    for tensor, value in alone.items():
        torch.testing.assert_close(value, together[tensor], rtol=2e-2, atol=1e-3)
