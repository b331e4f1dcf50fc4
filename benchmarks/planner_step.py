"""One real training step in a process of its own: what it takes, as PyTorch's allocator and the kernel say.

`python -m benchmarks.planner_step '<case as JSON>'` prints `{"allocated": bytes, "resident": bytes}`. The
step is not the first (the optimizer has its moments), and the microbatch not the first of the step
(gradients are there).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_planner import Case
from training.adapted import Adapted
from training.hardware import Applied
from training.memory import Load
from training.microbatch import Microbatch
from training.qlora import KEPT_PLAIN
from training.recipe import Recipe
from training.steps import optimizer_of
from training.world import World

WORDS = 1000


def built(case: Case, options: Recipe, config: Any) -> Adapted:
    """The model with random weights, adapted."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, case.dtype)
    if options.method == "qlora" and options.frozen_weights == "nf4":
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
            # The model's own save_pretrained writes in the first of several processes only.
            save_model(plain, str(Path(folder) / "model.safetensors"), {"format": "pt"})
            del plain
            nf4 = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=KEPT_PLAIN,
            )
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, quantization_config=nf4, attn_implementation=case.attention
            )
            for each in (*model.parameters(), *model.buffers()):
                each.data = each.data.clone()  # not a window into the file
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=case.attention)
    run_as = Applied(case.attention, liger=False, compile=False, why_not={})
    adapted = Adapted(model, options, dtype, run_as)
    if case.processes > 1:
        adapted.divide(torch.device("cpu"))
    return adapted


def read(load: Load) -> Microbatch:
    """A microbatch of that size."""
    ids = torch.randint(0, WORDS, (load.examples, load.length))
    learned = torch.zeros(load.examples, load.length, dtype=torch.bool)
    learned[:, load.length - load.learned :] = True
    places = learned.flatten().nonzero().squeeze(1)
    return Microbatch(ids, places, torch.randint(0, WORDS, (len(places),)), torch.ones(len(places)))


def learn(adapted: Adapted, load: Load) -> None:
    """One microbatch forwards and backwards."""
    microbatch = read(load)
    adapted.loss_on(microbatch).backward()  # type: ignore[no-untyped-call]


def move(adapted: Adapted, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's part of a step."""
    adapted.hand_over_gradients()
    torch.nn.utils.clip_grad_norm_(adapted.masters, 1.0)
    optimizer.step()


def held(adapted: Adapted, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all that is kept between microbatches, each storage once."""
    kept: list[torch.Tensor] = [*adapted.model.parameters(), *adapted.model.buffers(), *adapted.masters]
    for each in adapted.model.modules():
        state = getattr(each, "quant_state", None) or getattr(
            getattr(each, "weight", None), "quant_state", None
        )
        kept += [] if state is None else [state.absmax]
    kept += [each.grad for each in kept if each.grad is not None]
    kept += [value for state in optimizer.state.values() for value in state.values()]
    kept = [each.to_local() if isinstance(each, DTensor) else each for each in kept]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}.values())


def transient(folder: Path, run: Any) -> int:
    """The most that `run` had allocated at once, as PyTorch's own allocator says."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    watched.export_chrome_trace(str(folder / "trace.json"))
    trace = json.loads((folder / "trace.json").read_text())
    events = [each["args"] for each in trace["traceEvents"] if each.get("name") == "[memory]"]
    return max(int(each["Total Allocated"]) for each in events)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main(words: str) -> None:
    """Measure, and print it."""
    case = Case(**json.loads(words))
    world = World.join()
    small = case.recipe()
    warm = built(case, small, case.config(small=True))
    learn(warm, Load(1, 64, 8))
    move(warm, optimizer_of(warm, small))
    del warm
    gc.collect()
    baseline = status("VmRSS")
    options = case.recipe()
    adapted = built(case, options, case.config())
    optimizer = optimizer_of(adapted, options)
    learn(adapted, case.load)
    move(adapted, optimizer)
    adapted.forget_gradients()
    adapted.take_over_masters()
    learn(adapted, case.load)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man 5 proc)
    learn(adapted, case.load)
    resident = status("VmHWM") - baseline
    kept = held(adapted, optimizer)

    def whole() -> None:
        learn(adapted, case.load)
        move(adapted, optimizer)

    with tempfile.TemporaryDirectory() as folder:
        most = transient(Path(folder), whole)
    if world.first:
        print(json.dumps({"allocated": kept + most, "resident": resident}))
    world.leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(sys.argv[1])
