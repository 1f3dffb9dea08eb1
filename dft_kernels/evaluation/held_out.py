"""How a model does on text it was not trained on, and how varied its own text is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loss.functional import linear_distribution_loss, shift_labels
from ..models.heads import head_of, hidden_states, output_layer, projection


@dataclass(frozen=True)
class HeldOut:
    """Means over the tokens of a text, in nats: cross-entropy, the model's entropy, KL(teacher || model) and its
    teacher's entropy are of the same rows; accuracy: the likeliest token is the text's."""

    tokens: int
    cross_entropy: float
    entropy: float
    accuracy: float
    kl: float | None

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy)"""
        return math.exp(self.cross_entropy)


@torch.no_grad()
def held_out(
    model: Any, batches: Iterable[dict[str, Tensor]], teacher: Callable[[dict[str, Tensor]], Any] | None = None
) -> HeldOut:
    """`model` over batches of input_ids, labels, attention_mask or a pack's position_ids [B, T]. teacher: makes one of
    `linear_distribution_loss` of a batch. Never holds logits [B, T, V]; the model is left in the mode it was in."""
    head, layer, training = head_of(model, adapted=True), output_layer(model), model.training
    sums: dict[str, float] = {"tokens": 0.0, "hard_loss": 0.0, "entropy": 0.0, "correct": 0.0, "soft_loss": 0.0}
    model.eval()
    try:
        for batch in batches:
            batch = {name: value.to(layer.weight.device) for name, value in batch.items()}
            told = {name: batch[name] for name in ("position_ids",) if name in batch}  # of a pack
            hidden = hidden_states(model, batch["input_ids"], batch.get("attention_mask"), **told)
            target = shift_labels(batch["labels"])
            _, found = linear_distribution_loss(
                hidden,
                target=target,
                teacher=None if teacher is None else teacher(batch),
                **projection(layer, hidden),
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                reduction="sum",
                return_metrics=True,
            )
            sums["tokens"] += int((target != -100).sum())
            for name in ("hard_loss", "entropy", "correct", *(("soft_loss",) if teacher is not None else ())):
                sums[name] += float(getattr(found, name).double().sum())
    finally:
        model.train(training)
    count = sums["tokens"]
    if count == 0:
        raise ValueError("held_out: batches must hold at least one label, got none. Hold out more text.")
    kl = None if teacher is None else sums["soft_loss"] / count
    return HeldOut(int(count), sums["hard_loss"] / count, sums["entropy"] / count, sums["correct"] / count, kl)


def distinct(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of some token sequences: distinct-n (Li et al., arXiv:1510.03055), which falls
    with the length of what it is taken of; 0 without any."""
    grams = [tuple(ids[at : at + n]) for ids in sequences for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
