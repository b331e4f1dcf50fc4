"""How much memory a training step takes, by part, found without weights and without computing.

The very code that trains is run on tensors that have shapes and no contents (PyTorch's meta device,
https://docs.pytorch.org/docs/stable/meta.html), and every allocation it would make is written down until it
would be let go. So there is no formula to fall behind a model's code; what a kernel allocates inside itself
is not seen, and is in the margin. Only fused attention stands here by what it keeps, as it has no kernel
without contents.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.base import stay_offline
from training.hardware import Applied
from training.microbatch import Microbatch
from training.recipe import Recipe
from training.stand_ins import FUSED, fused_attention, pack

if TYPE_CHECKING:
    from training.adapted import Adapted

PARTS = ("weights", "adapter", "optimizer", "activations", "logits", "workspace")
"""`adapter`: what is trained, its float32 originals and gradients. `workspace`: what the backward pass, and
packed weights while they are used, take on top; of a divided model, the layers that are gathered, too."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes at the moment when a step takes most, by part (PARTS)."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Load:
    """A microbatch: so many examples of so many tokens, `learned` of each being labels."""

    examples: int
    length: int
    learned: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that are allocated now, and were at the peak, by the part that was named when they were."""

    def __init__(self, part: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = part
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and write down the storages that it made."""
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._note(each.untyped_storage())
        return made

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these, whatever is made of them in place."""
        self._known.update(each.untyped_storage()._cdata for each in tensors)

    def begin(self) -> None:
        """Forget the peak so far."""
        self._most = 0
        self._compare()

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now[self.part] += size
        weakref.finalize(storage, self._let_go, key, self.part, size)
        self._compare()

    def _let_go(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self.now[part] -= size

    def _compare(self) -> None:
        total = self.now.total()
        if total > self._most:
            self._most, self.peak = total, dict(self.now)


def step_memory(
    config: Any,
    recipe: Recipe,
    load: Load,
    dtype: torch.dtype,
    attention: str,
    *,
    on_gpu: bool = True,
    processes: int = 1,
) -> Need:
    """What a step takes that is not the first, in its second microbatch, where gradients are there already.

    Args:
        config: the text model's configuration, of transformers.
        recipe: method, adapter, optimizer and checkpointing are read from it.
        load: the microbatch.
        dtype: the compute type.
        attention: the kind, as transformers names it.
        on_gpu: whether the optimizer works as it does there.
        processes: among which the model is divided, if the recipe says so; what one of them takes is told.
    """
    stay_offline()
    from transformers import AttentionInterface

    AttentionInterface.register(FUSED, fused_attention)
    kind = "eager" if attention == "eager" else FUSED
    run_as = Applied(attention, liger=False, compile=False, why_not={})
    validated = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)  # it would look at contents
    ledger = Ledger("weights")
    try:
        with torch.device("meta"):
            if recipe.sharding == "fsdp":
                _divided_step(
                    _built(config, recipe, dtype, run_as, kind, ledger), recipe, load, processes, ledger
                )
            else:
                with ledger:
                    adapted = _built(config, recipe, dtype, run_as, kind, ledger)
                    _step(adapted, recipe, load, ledger, on_gpu=on_gpu)
    finally:
        torch.distributions.Distribution.set_default_validate_args(validated)
    return Need({part: ledger.peak.get(part, 0) for part in PARTS})


def _built(
    config: Any, recipe: Recipe, dtype: torch.dtype, run_as: Applied, kind: str, ledger: Ledger
) -> Adapted:
    from transformers import AutoModelForCausalLM

    from training.adapted import Adapted

    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    if recipe.method == "qlora" and recipe.frozen_weights == "nf4":
        pack(model, ledger)
    ledger.part = "adapter"
    return Adapted(model, recipe, dtype, run_as)


def _step(adapted: Adapted, recipe: Recipe, load: Load, ledger: Ledger, *, on_gpu: bool) -> None:
    """A step of a model that is whole."""
    ledger.part = "optimizer"
    eight_bit = recipe.optimizer == "paged_adamw_8bit"
    counts = [each.numel() for each in adapted.masters]
    optimizer = _Moments(counts, eight_bit=eight_bit, at_once=on_gpu)
    ledger.part = "adapter"
    for each in adapted.model.parameters():
        if each.requires_grad:
            each.grad = torch.zeros_like(each)
    ledger.begin()
    _forwards_and_backwards(adapted, load, ledger)
    adapted.hand_over_gradients()
    torch.nn.utils.clip_grad_norm_(adapted.masters, recipe.clip_gradient)
    optimizer.step()


@dataclass(frozen=True, slots=True)
class _Division:
    """Of a divided model: bytes, but for what is trained, which is counted."""

    frozen: int
    buffers: int
    trained: list[int]
    stays: int
    """Gathered for a whole microbatch: what is in no part."""
    largest_part: int
    largest_layer: int
    reduced: int
    """Trained of one part, whose gradients are added up at once, in float32."""
    reduced_last: int
    """And of what is in no part."""

    @classmethod
    def of(cls, adapted: Adapted, causal: Any, divided: list[torch.nn.Module]) -> _Division:
        """What a model is divided into."""
        trained = [each.numel() for each in adapted.masters]
        in_parts = [sum(each.numel() for each in part.parameters() if each.requires_grad) for part in divided]
        whole = set(causal.parameters())
        return cls(
            frozen=sum(each.nbytes for each in whole if not each.requires_grad),
            buffers=sum(each.nbytes for each in causal.buffers()),
            trained=trained,
            stays=_gathered(causal) - sum(map(_gathered, divided)),
            largest_part=max(map(_gathered, divided)),
            largest_layer=max(map(_gathered, causal.model.layers)),
            reduced=max(in_parts),
            reduced_last=sum(trained) - sum(in_parts),
        )


def _divided_step(adapted: Adapted, recipe: Recipe, load: Load, processes: int, ledger: Ledger) -> None:
    """A step of a model that is divided: its parts, and what is gathered of it, stand for its weights.

    Two parts are gathered at once: the one in use, and what the next one is unpacked from.
    """
    from training.sharding import parts

    causal = adapted.model.get_base_model() if recipe.method != "full" else adapted.model
    divided = parts(causal)
    found = _Division.of(adapted, causal, divided)
    ledger.leave_out((*causal.parameters(), *causal.buffers(), *adapted.masters))
    for part in divided:
        for each in part.parameters():
            if each.requires_grad:  # a gradient leaves its layer when that is done, for those who keep it
                each.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
    share = [-(-count // processes) for count in found.trained]
    with ledger:
        ledger.part = "weights"
        kept = [_bytes(-(-found.frozen // processes) + found.buffers)]
        ledger.part = "adapter"
        kept += [torch.empty(sum(share)) for _ in ("originals", "gradients")]
        ledger.part = "optimizer"
        optimizer = _Moments(share, eight_bit=False, at_once=False)
        ledger.part = "workspace"
        ledger.begin()
        _bytes(found.stays + 2 * found.largest_part)  # embeddings of every layer, before anything else
        kept += [_bytes(found.stays + 2 * found.largest_layer), torch.empty(found.reduced)]
        _forwards_and_backwards(adapted, load, ledger)
        torch.empty(found.reduced_last)
        optimizer.step()
    del kept


def _let_go(trained: torch.Tensor) -> None:
    trained.grad = None


def _gathered(module: torch.nn.Module) -> int:
    """Bytes of a module's weights in one piece."""
    return sum(each.nbytes for each in module.parameters())


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def _forwards_and_backwards(adapted: Adapted, load: Load, ledger: Ledger) -> None:
    ledger.part = "activations"
    microbatch = _microbatch(load)
    hidden = adapted.hidden(microbatch)
    ledger.part = "logits"
    loss = adapted.loss_at(hidden, microbatch)
    ledger.part = "workspace"
    loss.backward()  # type: ignore[no-untyped-call]


def _microbatch(load: Load) -> Microbatch:
    labels = load.examples * load.learned
    return Microbatch(
        ids=torch.zeros(load.examples, load.length, dtype=torch.long),
        places=torch.zeros(labels, dtype=torch.long),
        labels=torch.zeros(labels, dtype=torch.long),
        weights=torch.ones(labels),
    )


class _Moments:
    """Stands for AdamW: two moments of each parameter, and what it takes on top while it moves them.

    PyTorch's own looks at its step's number, which has no contents here. In float32 a moment takes four
    bytes. bitsandbytes' in 8 bits takes one, and a float32 scale for 256 of each; what it pages out of a
    GPU's memory when it must is reckoned as being in. On a GPU PyTorch moves all parameters at once, and
    takes as much again for it as one moment; on a processor one after the other.
    """

    def __init__(self, counts: list[int], *, eight_bit: bool, at_once: bool) -> None:
        if eight_bit:
            self.kept = [torch.empty(2 * count, dtype=torch.uint8) for count in counts]
            self.kept += [torch.empty(2 * -(-count // 256)) for count in counts]
            self._working = 0
        else:
            self.kept = [torch.empty(2 * count) for count in counts]
            self._working = sum(counts) if at_once else 2 * max(counts)

    def step(self) -> None:
        """Move the parameters, in place."""
        torch.empty(self._working)
