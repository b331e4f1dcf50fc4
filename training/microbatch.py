"""Examples as the tensors that a model reads at once: a row each, padded, or packed end to end in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from training.tensors import IGNORED, PADDING, Example


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward pass reads, and what it must predict.

    `ids` is (rows, length). `segments` and `positions`, of the same shape, are None unless examples share a
    row: which example a token is of, and its place in that. `places` (labels,) are indices into the flattened
    ids; `labels` and `weights` (float32) are of the same length.
    """

    ids: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> Microbatch:
        """The same on another device."""
        if self.ids.device == device:
            return self
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("ids", "places", "labels", "weights", "segments", "positions")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def grouped(batch: Sequence[Example], max_tokens: int, *, packing: bool) -> list[list[Example]]:
    """`batch` in groups of at most `max_tokens`, padding counted, or of one example that is longer.

    With `packing` a group's lengths add up (first fit, the longest first); without, examples of like length
    share a group, padded to the longest.
    """
    groups: list[list[Example]] = []
    if not packing:
        for one in sorted(batch, key=len):
            if groups and len(one) * (len(groups[-1]) + 1) <= max_tokens:
                groups[-1].append(one)
            else:
                groups.append([one])
        return groups
    for one in sorted(batch, key=len, reverse=True):
        for group in groups:
            if sum(map(len, group)) + len(one) <= max_tokens:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def padded(group: Sequence[Example]) -> Microbatch:
    """A row each, padded on the right. No mask is needed: attention is causal, and padding comes last."""
    longest = max(map(len, group))
    ids = torch.full((len(group), longest), PADDING)
    labels = torch.full((len(group), longest), IGNORED)
    for row, one in enumerate(group):
        ids[row, : len(one)] = torch.tensor(one.ids)
        labels[row, : len(one)] = torch.tensor(one.labels)
    weights = torch.tensor([one.weight for one in group])
    return _learned(ids, labels, weights[:, None].expand_as(labels))


def packed(group: Sequence[Example]) -> Microbatch:
    """One row, end to end, that `masks` keeps apart."""
    if len(group) == 1:
        return padded(group)
    lengths = torch.tensor([len(one) for one in group])
    microbatch = _learned(
        torch.tensor([[word for one in group for word in one.ids]]),
        torch.tensor([[label for one in group for label in one.labels]]),
        torch.tensor([one.weight for one in group]).repeat_interleave(lengths)[None],
    )
    return replace(
        microbatch,
        segments=torch.arange(len(group)).repeat_interleave(lengths)[None],
        positions=torch.cat([torch.arange(len(one)) for one in group])[None],
    )


def _learned(ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> Microbatch:
    learned = labels != IGNORED
    return Microbatch(ids, learned.flatten().nonzero().squeeze(1), labels[learned], weights[learned])


def masks(
    microbatch: Microbatch, window: int | None, *, dense: torch.dtype | None = None
) -> dict[str, torch.Tensor | None]:
    """Who sees whom, by kind of layer: boolean (rows or 1, 1, length, length), or None for plain causality.

    A token sees those before it in its own example, in layers with a sliding window the last `window` of
    them. None lets the attention leave out what is in the future instead of masking it.

    Args:
        microbatch: the tokens.
        window: the sliding window of the model, if it has one.
        dense: for eager attention, which adds its mask: the type in which it computes.
    """
    length, device = microbatch.ids.shape[1], microbatch.ids.device
    if window is not None and length < window:
        window = None
    if microbatch.segments is None and window is None and dense is None:
        return {"full_attention": None, "sliding_attention": None}
    place = torch.arange(length, device=device)
    back = place[:, None] - place
    full = (back >= 0)[None, None]
    if microbatch.segments is not None:
        full = full & (microbatch.segments[:, None, :, None] == microbatch.segments[:, None, None, :])
    sliding = full if window is None else full & (back < window)
    if dense is not None:
        return {"full_attention": _added(full, dense), "sliding_attention": _added(sliding, dense)}
    plain = microbatch.segments is None
    return {"full_attention": None if plain else full, "sliding_attention": sliding}


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zero where a token is seen, the least number where it is not."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
