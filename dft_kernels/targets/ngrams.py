"""Counting of bigrams and trigrams in bounded memory, and which of them a target tracks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCKS = 16  # random parts of a corpus, whose halves give noise floors; a power of 2
LIMIT = 1 << 23  # different n-grams kept, of each size
COMPLETIONS = 12288  # tracked, of each size
SEEN = 4  # times at least, to be tracked
ENTROPY_BIAS = 0.1  # nats: contexts whose correction is above it are left out
_BUFFER = 1 << 20  # n-grams before they are merged


class NGramCounts:
    """Counts of all n-grams (n = 2, 3) of V tokens, by block: sorted keys (the tokens as digits of base V, then the
    block) with their counts. Where more than `limit` differ, those seen once are dropped (`dropped` counts them)."""

    def __init__(self, size: int, vocab_size: int, limit: int = LIMIT) -> None:
        if vocab_size**size * BLOCKS >= 1 << 63:
            raise ValueError(
                f"target: {size}-grams of a tokenizer must fit 63 bits, got {vocab_size} tokens. Use another tokenizer."
            )
        self.size, self.vocab_size, self.limit, self.dropped = size, vocab_size, limit, 0
        self.positions = np.zeros(BLOCKS, np.int64)
        self._parts: list[tuple[Any, Any]] = []
        self._buffered = 0

    def add(self, ids: Any, block: int) -> None:
        """The n-grams of a document's ids [T] int64."""
        count = len(ids) - self.size + 1
        if count < 1:
            return
        key = ids[:count]
        for at in range(1, self.size):
            key = key * self.vocab_size + ids[at : at + count]
        self.positions[block] += count
        self._parts.append((key * BLOCKS + block, np.ones(count, np.int64)))
        self._buffered += count
        if self._buffered > _BUFFER:
            self._settle()

    def merge(self, other: NGramCounts) -> None:
        """Add another's counts."""
        self.positions += other.positions
        self.dropped += other.dropped
        self._parts.append(other.counts())
        self._buffered += len(self._parts[-1][0])

    def counts(self) -> tuple[Any, Any]:
        """Keys, ascending, and counts."""
        self._settle()
        return self._parts[0] if self._parts else (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def _settle(self) -> None:
        if not self._buffered:
            return
        self._buffered = 0
        keys, counts = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.argsort(keys, kind="stable")
        keys, counts = summed(keys[order], counts[order])
        if len(keys) > self.limit:
            kept = counts > 1
            self.dropped += int((~kept).sum())
            keys, counts = keys[kept], counts[kept]
        self._parts = [(keys, counts)]


def summed(keys: Any, counts: Any) -> tuple[Any, Any]:
    """Ascending keys with the counts of equal ones added."""
    if not len(keys):
        return keys, counts
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


@dataclass(frozen=True)
class Tracked:
    """The n-grams that a target tracks, with counts by block: prefixes [M, 2] and what follows them."""

    contexts: Any  # [M, 2]
    starts: Any  # [M + 1]
    completions: Any  # [E]
    context_counts: Any  # [M, BLOCKS]
    counts: Any  # [E, BLOCKS]
    positions: Any  # [M, BLOCKS]: of contexts of this length

    def tensors(self, blocks: Any) -> dict[str, Tensor]:
        """The statistics of some blocks."""
        of_context = self.context_counts[:, blocks].sum(1)
        positions = self.positions[:, blocks].sum(1)
        denominator = np.repeat(of_context, np.diff(self.starts))
        return {
            "ngram_contexts": torch.from_numpy(self.contexts.astype(np.int32)),
            "ngram_starts": torch.from_numpy(self.starts.astype(np.int32)),
            "ngram_completions": torch.from_numpy(self.completions.astype(np.int32)),
            "ngram_probability": torch.from_numpy(
                (self.counts[:, blocks].sum(1) / np.maximum(denominator, 1)).astype(np.float32)
            ),
            "ngram_context_probability": torch.from_numpy((of_context / np.maximum(positions, 1)).astype(np.float32)),
        }


def tracked(counters: list[NGramCounts], completions: int = COMPLETIONS, seen: int = SEEN) -> Tracked | None:
    """The `completions` most frequent n-grams of each size, of those seen so often at least; None where none was."""
    made = [one for counter in counters if (one := _tracked(counter, completions, seen)) is not None]
    if not made:
        return None
    offsets = np.cumsum([0] + [part.starts[-1] for part in made])
    starts = [part.starts[:-1] + offset for part, offset in zip(made, offsets, strict=False)] + [offsets[-1:]]
    rest = ("completions", "context_counts", "counts", "positions")
    joined = {name: np.concatenate([getattr(part, name) for part in made]) for name in rest}
    return Tracked(np.concatenate([part.contexts for part in made]), np.concatenate(starts), **joined)


def _tracked(counter: NGramCounts, completions: int, seen: int) -> Tracked | None:
    keys, counts = counter.counts()
    grams, totals = summed(keys // BLOCKS, counts)
    likely = np.flatnonzero(totals >= seen)
    if not len(likely):
        return None
    kept = np.sort(likely[np.argsort(-totals[likely], kind="stable")][:completions])
    grams = grams[kept]
    V = counter.vocab_size
    prefixes, first = np.unique(grams // V, return_index=True)
    contexts = np.stack([prefixes // V if counter.size == 3 else np.full_like(prefixes, -1), prefixes % V], 1)
    return Tracked(
        contexts,
        np.append(first, len(grams)),
        grams % V,
        _by_block(prefixes, *summed_prefixes(keys, counts, V)),
        _by_block(grams, keys, counts),
        np.broadcast_to(counter.positions, (len(prefixes), BLOCKS)),
    )


def summed_prefixes(keys: Any, counts: Any, vocab_size: int) -> tuple[Any, Any]:
    """Counts of what stands before the last token, by block, as keys and counts."""
    prefix = keys // BLOCKS // vocab_size * BLOCKS + keys % BLOCKS
    order = np.argsort(prefix, kind="stable")
    return summed(prefix[order], counts[order])


def _by_block(wanted: Any, keys: Any, counts: Any) -> Any:
    """Counts [len(wanted), BLOCKS] of ascending n-grams."""
    out = np.zeros((len(wanted), BLOCKS), np.int64)
    grams = keys // BLOCKS
    at = np.minimum(np.searchsorted(wanted, grams), len(wanted) - 1)
    hit = wanted[at] == grams
    out[at[hit], keys[hit] % BLOCKS] = counts[hit]
    return out


def entropies(counter: NGramCounts, least: int = 100, bias: float = ENTROPY_BIAS) -> dict[str, Tensor] | None:
    """Entropy of the next token after each token whose corpus is large enough for it, in nats:

        H = -sum p log p + (k - 1) / (2 n)        Miller-Madow (Miller, 1955; see Paninski, Neural Computation 15, 2003)

    of n occurrences with k different next tokens. Left out: n < least, or a correction above `bias`: what remains of
    the bias is then of second order. These are contexts that repeat, so they tell less than the language's entropy.
    """
    keys, counts = counter.counts()
    grams, totals = summed(keys // BLOCKS, counts)
    if not len(grams) or counter.dropped:
        return None
    prefixes, first = np.unique(grams // counter.vocab_size, return_index=True)
    n = np.add.reduceat(totals, first)
    k = np.diff(np.append(first, len(grams)))
    plain = np.maximum(np.log(n) - np.add.reduceat(totals * np.log(totals), first) / n, 0)  # not -1e-16
    correction = (k - 1) / (2 * n)
    kept = (n >= least) & (correction <= bias)
    if not kept.any():
        return None
    return {
        "entropy": torch.from_numpy((plain + correction)[kept].astype(np.float32)),
        "entropy_contexts": torch.from_numpy(prefixes[kept].astype(np.int32)),
        "entropy_weight": torch.from_numpy((n[kept] / n[kept].sum()).astype(np.float32)),
    }
