"""How much likelier a target makes each token than a model's own writing does, by the tokens before it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..targets.target import Target
from .potentials import LIMIT


class Continued:
    """Log odds ratios of the n-grams (n = 2, 3) that two Targets track, both, on some tokens.

    support [S]: ids of the tokens, ascending; what does not end in one of them is left out."""

    def __init__(self, target: Target, native: Target, support: Tensor) -> None:
        self.base = len(target["unigram"]) + 1
        (keys, p), (others, q) = (_tracked(one, self.base) for one in (target, native))
        both, here, there = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
        ratio = np.clip(_logit(p[here]) - _logit(q[there]), -LIMIT, LIMIT)
        contexts, tokens = np.divmod(both, self.base)
        at = np.searchsorted(support.numpy(), tokens)
        known = (at < len(support)) & (support.numpy()[np.minimum(at, len(support) - 1)] == tokens)
        contexts, at, ratio = contexts[known], at[known], ratio[known]  # ascending, as `both` is
        found, starts = np.unique(contexts, return_index=True)
        self.size, self.width = len(support), int(np.diff([*starts, len(contexts)]).max(initial=0))
        self.contexts = torch.from_numpy(np.append(found, np.iinfo(np.int64).max))
        self.starts = torch.from_numpy(np.append(starts, [len(contexts)] * 2).astype(np.int64))
        fill = self.width  # so that a row of `width` may begin at any place
        self.at = torch.from_numpy(np.append(at, [self.size] * fill).astype(np.int64))
        self.ratio = torch.from_numpy(np.append(ratio, [0.0] * fill).astype(np.float32))

    def to(self, device: torch.device) -> None:
        """Move its tables."""
        for name in ("contexts", "starts", "at", "ratio"):
            setattr(self, name, getattr(self, name).to(device))

    def __call__(self, input_ids: Tensor, text: Tensor) -> Tensor:
        """[B, S] of the tokens after ids [B, T]; text [B, T]: which of them are. Of a token that ends a trigram and a
        bigram the trigram's."""
        out = torch.zeros(len(input_ids), self.size + 1, device=input_ids.device)
        last = torch.where(text[:, -1], input_ids[:, -1] + 1, 0)
        before = torch.zeros_like(last)
        if input_ids.shape[1] > 1:
            before = torch.where(text[:, -2], input_ids[:, -2] + 1, 0)
        for context in (last, before * self.base + last):
            number = torch.searchsorted(self.contexts, context)
            known = self.contexts[number] == context
            start = self.starts[number][:, None]
            rows = start + torch.arange(self.width, device=start.device)
            inside = (rows < self.starts[number + 1][:, None]) & known[:, None]
            rows = torch.where(inside, rows, len(self.at) - 1) if self.width else rows
            out.scatter_(1, torch.where(inside, self.at[rows], self.size), self.ratio[rows])
        return out[:, :-1]


def _tracked(one: Target, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each n-gram a key, (before + 1) base^2 + (last + 1) base + token, and P(token | before, last)."""
    size = one["ngram_starts"].long().diff()
    contexts = (one["ngram_contexts"].long() + 1).repeat_interleave(size, 0)
    keys = (contexts[:, 0] * base + contexts[:, 1]) * base + one["ngram_completions"].long()
    return keys.numpy(), one["ngram_probability"].double().numpy()


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p) - np.log1p(-p)
