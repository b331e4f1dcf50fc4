"""Cross-entropy over a large vocabulary, computed only where there is a label, a few rows at a time.

Gemma's vocabulary has 262,144 words: the logits of one example of 100 tokens are 105 MB, and their gradient
as much again. Here a few rows exist at once, and their gradient is taken while they do, so that a training
step touches 134 MB for them, whatever the batch (idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary
Language Models", https://arxiv.org/abs/2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch

ROWS = 64
"""Rows of logits at once: 64 x 262,144 float32 are 67 MB."""


def label_loss(
    hidden: torch.Tensor,
    vocabulary: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    cap: float | None = None,
) -> torch.Tensor:
    """The weighted sum of cross-entropies, in nats, as a float32 scalar.

    It has a gradient for `hidden`, and for `vocabulary` where that is trained.

    Args:
        hidden: last hidden states at the labels, (labels, width).
        vocabulary: the output embedding, (words, width).
        labels: the words to predict, (labels,).
        weights: of each label, (labels,), float32.
        cap: logits are `cap * tanh(logits / cap)`, as in Gemma 2 and 3n (`final_logit_softcapping`).
    """
    loss: torch.Tensor = _LabelLoss.apply(hidden, vocabulary, labels, weights, cap)
    return loss


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        vocabulary: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        cap: float | None,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        of_words = torch.zeros_like(vocabulary) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            label, weight = labels[rows, None], weights[rows, None]
            logits = (hidden[rows] @ vocabulary.t()).float()
            slope = None
            if cap is not None:
                bent = logits.div_(cap).tanh_()
                slope = 1 - bent.square()
                logits = bent.mul_(cap)
            logits -= logits.amax(dim=1, keepdim=True)
            right = logits.gather(1, label)
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += (weight * (total.log() - right)).sum()
            # d loss / d logits = weight * (softmax - one at the label)
            logits *= weight / total
            logits.scatter_add_(1, label, -weight)
            if slope is not None:
                logits *= slope
            gradients = logits.to(vocabulary.dtype)
            gradient[rows] = gradients @ vocabulary
            if of_words is not None:
                of_words.addmm_(gradients.t(), hidden[rows])
        ctx.save_for_backward(gradient, of_words)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        gradient, of_words = ctx.saved_tensors
        return gradient * outer, None if of_words is None else of_words * outer, None, None, None
