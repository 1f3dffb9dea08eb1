"""Blends of tracked n-grams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .target import Target


def powers(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """prod x_i^w_i, 0 where any x_i of w_i other than 0 is 0."""
    out, there = torch.zeros_like(values[0]), torch.ones_like(values[0], dtype=torch.bool)
    for value, weight in zip(values, weights, strict=True):
        if weight:
            there &= value > 0
            out = out + weight * value.clamp(min=1e-300).log()
    return torch.where(there, out.exp(), 0)


class _Trie:
    """A target's n-grams under integer keys: of contexts (ascending), and of contexts with what follows."""

    def __init__(self, target: Target, base: int) -> None:
        contexts = target["ngram_contexts"].long() + 1
        self.keys = contexts[:, 0] * base + contexts[:, 1]  # [M]
        self.context = target["ngram_context_probability"].double()
        sizes = target["ngram_starts"].diff().long()
        self.of = torch.arange(len(sizes)).repeat_interleave(sizes)  # [E]
        self.grams = self.keys[self.of] * base + target["ngram_completions"].long()
        self.probability = target["ngram_probability"].double()


def linear_ngrams(
    targets: Sequence[Target], weights: Sequence[float], clip: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """P(context) = sum w_i P_i(context), P(completion | context) = sum w_i P_i(both) / P(context) over the union; what
    one of them does not track counts as 0 there."""
    base = _base(targets)
    tries = [_Trie(one, base) for one in targets]
    keys = torch.cat([trie.keys for trie in tries]).unique()
    grams = torch.cat([trie.grams for trie in tries]).unique()
    context, joint = torch.zeros(len(keys), dtype=torch.float64), torch.zeros(len(grams), dtype=torch.float64)
    for trie, weight in zip(tries, weights, strict=True):
        context.index_add_(0, torch.searchsorted(keys, trie.keys), weight * trie.context)
        both = weight * trie.context[trie.of] * trie.probability
        joint.index_add_(0, torch.searchsorted(grams, trie.grams), both)
    context, joint = clip("ngram_context_probability", context), clip("ngram_probability", joint)
    return _tensors(keys, context, grams, joint, base)


def log_linear_ngrams(targets: Sequence[Target], weights: Sequence[float]) -> dict[str, Tensor]:
    """prod P_i(completion | context)^w_i and prod P_i(context)^w_i of what all track, the rest of each being one more
    outcome, normalised (contexts: of one length among themselves)."""
    base = _base(targets)
    tries = [_Trie(one, base) for one in targets]
    keys, grams = (_common([getattr(trie, name) for trie in tries]) for name in ("keys", "grams"))
    contexts = torch.stack([trie.context[torch.searchsorted(trie.keys, keys)] for trie in tries])  # [n, M]
    for those in (keys < base, keys >= base):
        contexts[:, those] = _normalised(contexts[:, those], powers, weights)
    context = contexts[0]
    grams = grams[torch.isin(grams // base, keys)]
    given = torch.stack([trie.probability[torch.searchsorted(trie.grams, grams)] for trie in tries])  # [n, E]
    of = torch.searchsorted(keys, grams // base)
    rest = torch.ones(len(tries), len(keys), dtype=torch.float64).index_add(1, of, -given).clamp(min=0)
    product, left = powers(list(given), weights), powers(list(rest), weights)
    total = left.index_add(0, of, product)
    return _tensors(keys, context, grams, context[of] * product / total[of], base)


def _normalised(values: Tensor, powers: Callable[..., Tensor], weights: Sequence[float]) -> Tensor:
    whole = torch.cat([values, (1 - values.sum(1, keepdim=True)).clamp(min=0)], 1)
    product = powers(list(whole), weights)
    return product[:-1] / product.sum().clamp(min=1e-300)


def _base(targets: Sequence[Target]) -> int:
    return 1 + max(len(one["unigram"]) for one in targets)


def _common(parts: list[Tensor]) -> Tensor:
    """Ascending values that all parts, each of distinct values, hold."""
    values, counts = torch.cat(parts).unique(return_counts=True)
    return values[counts == len(parts)]


def _tensors(keys: Tensor, context: Tensor, grams: Tensor, joint: Tensor, base: int) -> dict[str, Tensor]:
    kept = (joint > 0) & (context[torch.searchsorted(keys, grams // base)] > 0)
    grams, joint = grams[kept], joint[kept]
    at = torch.searchsorted(keys, grams // base)
    used, sizes = at.unique(return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    return {
        "ngram_contexts": torch.stack([keys[used] // base, keys[used] % base], 1).int() - 1,
        "ngram_starts": starts.int(),
        "ngram_completions": (grams % base).int(),
        "ngram_probability": (joint / context[at]).clamp(max=1).float(),
        "ngram_context_probability": context[used].clamp(max=1).float(),
    }
