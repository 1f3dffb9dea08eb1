"""What a model expects where it reads: human text, and its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..loss.functional import linear_distribution_loss, shift_labels
from ..models.heads import head_of, hidden_states, in_mode, output_layer, projection


@dataclass(frozen=True)
class Read:
    """Sums over the tokens of each text [D]: their number, and in nats -log q of them and the entropy of q before
    them."""

    tokens: Any
    cross_entropy: Any
    entropy: Any

    def mean(self, of: str, rows: Any) -> float:
        """Of a token of the texts in `rows`; NaN without any."""
        count = self.tokens[rows].sum()
        return float(getattr(self, of)[rows].sum() / count) if count else float("nan")


@dataclass(frozen=True)
class Reading:
    """human: of people's texts, the reference ones first; own: of those that the model went on with, after the same
    prompts as the reference."""

    human: Read
    own: Read


@torch.no_grad()
def read(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    batch: int = 8,
    tick: Callable[[int], None] | None = None,
) -> Read:
    """`model` over each text after its prompt; the prompt's own tokens are not counted, nor special ones, which the
    tokenizer adds as it does. Both are encoded together, and a token that begins in the prompt is the prompt's. tick:
    told of texts as they are read.

    Never holds logits [B, T, V]; the model is left in the mode it was in."""
    head, layer = head_of(model, adapted=True), output_layer(model)
    encoded = []
    for prompt, text in zip(prompts, texts, strict=True):
        one = tokenizer(prompt + text, return_offsets_mapping=True, verbose=False)
        own = [start >= len(prompt) for start, _ in one["offset_mapping"]]
        encoded.append((one["input_ids"], own))
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at][0]))
    found = np.zeros((3, len(encoded)))
    with in_mode(model, False):
        for first in range(0, len(order), batch):
            at = order[first : first + batch]
            width = max(1, *(len(encoded[one][0]) for one in at))
            ids, mask = torch.zeros(2, len(at), width, dtype=torch.long, device=layer.weight.device)
            labels = torch.full_like(ids, -100)
            for row, one in enumerate(at):
                of, mine = (torch.tensor(part, device=ids.device) for part in encoded[one])
                ids[row, : len(of)], mask[row, : len(of)] = of, 1
                labels[row, : len(of)] = torch.where(mine, of, -100)
            hidden = hidden_states(model, ids, mask)
            target = shift_labels(labels)
            loss, metrics = linear_distribution_loss(
                hidden, target=target, **projection(layer, hidden), logit_scale=head.logit_scale, softcap=head.softcap,
                reduction="none", return_metrics={"entropy"},
            )  # fmt: skip
            for row, values in enumerate((target >= 0, loss, metrics.entropy)):
                found[row, at] = values.double().sum(1).cpu().numpy()
            if tick is not None:
                tick(len(at))
    return Read(*found)
