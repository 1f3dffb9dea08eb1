"""How much a set of texts repeats itself."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_ORDERS = 4  # of BLEU's n-grams


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the texts, a line each, over their bytes compressed by DEFLATE at its highest level (Shaib et al.,
    arXiv:2403.00553): the more repetition, the higher."""
    data = "\n".join(texts).encode()
    return len(data) / len(zlib.compress(data, 9))


class SelfBLEU:
    """Mean over texts of BLEU-4 against all others of the set as references (Zhu et al., arXiv:1802.01886), 0 to 100:
    the more alike, the higher.

    As sacrebleu's `sentence_bleu` of tokenized text (exponential smoothing, effective order), whose values it equals,
    with the references' largest counts found once a set: O(n-grams) in place of O(texts²).
    """

    def __init__(self, grams: Sequence[Any], lengths: Any) -> None:
        """grams: counts of 1- to 4-grams, sparse [D, F]; lengths [D] in words."""
        self.lengths, self.entries = np.asarray(lengths), []
        for counts in grams:
            found = counts[:, np.flatnonzero((counts > 0).sum(0) > 1)].tocoo()  # what one document has matches none
            order = np.lexsort((-found.data, found.col))  # by n-gram, the largest count first
            self.entries.append((found.row[order], found.col[order], found.data[order]))

    def __call__(self, rows: Any) -> float:
        """Of some of the documents; NaN of fewer than two that have words."""
        rows = np.asarray(rows)[self.lengths[rows] > 0]
        if len(rows) < 2:
            return float("nan")
        chosen = np.zeros(len(self.lengths), bool)
        chosen[rows] = True
        matched = np.stack([self._matched(chosen, *entries) for entries in self.entries])[:, rows]  # [4, n]
        total = np.maximum(self.lengths[rows] - np.arange(_ORDERS)[:, None], 0)
        return float(np.mean([_bleu(*pair) for pair in zip(matched.T, total.T, strict=True)] * self._brevity(rows)))

    def _matched(self, chosen: Any, row: Any, gram: Any, count: Any) -> Any:
        """[D] n-grams of each document, each as often at most as another document has it."""
        keep = chosen[row]
        row, gram, count = row[keep], gram[keep], count[keep]
        if not len(row):
            return np.zeros(len(chosen))
        first = np.flatnonzero(np.diff(gram, prepend=-1))  # of each n-gram: its largest count
        size = np.diff(first, append=len(gram))
        second = np.where(size > 1, count[np.minimum(first + 1, len(count) - 1)], 0)
        others = np.repeat(count[first], size)
        others[first] = second
        return np.bincount(row, np.minimum(count, others), len(chosen))

    def _brevity(self, rows: Any) -> Any:
        """[n] exp(1 - r / c) where a text of c words is shorter than the reference nearest in length, r; of two as
        near, the shorter one."""
        known, where, times = np.unique(self.lengths[rows], return_inverse=True, return_counts=True)
        out = np.ones(len(known))
        for at in np.flatnonzero(times == 1):  # the others have a reference of their own length
            others = np.delete(known, at)
            nearest = others[np.argmin(np.abs(others - known[at]))]
            out[at] = np.exp(min(0.0, 1 - nearest / known[at]))
        return out[where]


def _bleu(matched: Any, total: Any) -> float:
    """BLEU without its brevity penalty of matches and n-grams by order."""
    smooth, logs = 1.0, []
    for hits, all_ in zip(matched, total, strict=True):
        if not all_:
            break
        if not hits:
            smooth *= 2
            hits = 1 / smooth
        logs.append(np.log(hits / all_))
    return float(100 * np.exp(np.mean(logs))) if matched.any() else 0.0
