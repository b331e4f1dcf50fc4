"""How far an unfinished training has come, kept so that a kill costs a few steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training import cycle
from training.compute import compute_dtype
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.adapted import Adapted
    from training.world import World


@dataclass(slots=True)
class History:
    """What was written of each step so far, in order: the lines of `training.jsonl`.

    `microbatch_tokens` is what fitted last, 0 until the recipe's own did not; `halved` says when and why.
    """

    lines: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    microbatch_tokens: int = 0
    halved: list[dict[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Checkpoint:
    """The folder `adapter.partial/`."""

    folder: Path
    dtype: str

    @classmethod
    def open(cls, folder: Path, inputs: dict[str, Any], options: Recipe, state_dir: Path) -> Checkpoint:
        """The checkpoint of a training of these inputs; one of any others is thrown away."""
        record = folder / "checkpoint.json"
        if not cycle.done(record, inputs):
            shutil.rmtree(folder, ignore_errors=True)
            dtype = str(compute_dtype(options.compute_dtype, state_dir)).removeprefix("torch.")
            cycle.write_json(record, {"inputs": inputs, "compute_dtype": dtype})
        checkpoint = cls.join(folder)
        cycle.discard_unfinished(checkpoint._state)
        return checkpoint

    @classmethod
    def join(cls, folder: Path) -> Checkpoint:
        """The checkpoint that another process has opened."""
        return cls(folder, cycle.read_json(folder / "checkpoint.json")["compute_dtype"])

    @property
    def _state(self) -> Path:
        return self.folder / "state.pt"

    @property
    def _finer(self) -> Path:
        return self.folder / "finer.json"

    def save(
        self,
        adapted: Adapted,
        optimizer: torch.optim.Optimizer,
        history: History,
        world: World | None = None,
    ) -> None:
        """Keep all that the next step depends on, in one piece: any number of processes can go on from it.

        All processes call this; the first writes.
        """
        first = world is None or world.first
        if not (first or adapted.divided):
            return
        from training import sharding

        state = {
            "masters": [sharding.whole(each.detach()) for each in adapted.masters],
            "optimizer": sharding.whole_moments(optimizer.state_dict()),
            "random": torch.get_rng_state(),
            "history": json.dumps(
                [history.lines, history.tokens, history.seconds, history.microbatch_tokens, history.halved]
            ),
        }
        if first:
            with cycle.new_file(self._state) as building:
                torch.save(state, building)

    def cut_finer(self, history: History) -> None:
        """Keep only that memory ran out, and what may fit, for the process that goes on from here."""
        note = {"microbatch_tokens": history.microbatch_tokens, "halved": history.halved}
        cycle.write_json(self._finer, note)

    def restore(self, adapted: Adapted, optimizer: torch.optim.Optimizer) -> History:
        """Set adapter, optimizer and random numbers to what was kept, if anything was."""
        history = self._restored(adapted, optimizer)
        if self._finer.is_file():
            finer = cycle.read_json(self._finer)
            history.microbatch_tokens, history.halved = finer["microbatch_tokens"], finer["halved"]
        return history

    def _restored(self, adapted: Adapted, optimizer: torch.optim.Optimizer) -> History:
        if not self._state.is_file():
            return History()
        from training import sharding

        state = torch.load(self._state, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for master, kept in zip(adapted.masters, state["masters"], strict=True):
                master.copy_(sharding.part_like(kept, master))
        adapted.take_over_masters()
        optimizer.load_state_dict(sharding.part_of_moments(state["optimizer"], adapted.masters))
        torch.set_rng_state(state["random"])
        return History(*json.loads(state["history"]))
