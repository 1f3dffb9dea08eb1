"""How far a text that is being written lies from a target, in floors of its own size.

The distances are those of `targets.comparison`. The floor of a distance is its mean over texts of as many sentences,
words or tokens, drawn one by one from the target's own distribution: what the shortness of a text does. Sentences and
words of people cluster, so that a person's text of the target's kind lies at somewhat more than one floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..evaluation.documents import WINDOW, Documents
from ..targets.comparison import compare
from ..targets.distances import sampling_floor
from ..targets.target import LETTERS, STATISTICS, WORDS, Target

DRAWS = 64  # texts that a floor is the mean of


class Row(NamedTuple):
    """A distance of comparison.py that is shown, the statistic that it is of, and how many `events` a number takes."""

    name: str
    statistic: str
    label: str
    events: str
    fewest: int


ROWS = (
    Row("sentence_words, W1", "sentence_words", "sentence length, W1 in words", "sentences", 5),
    Row("burstiness, L1", "sentence_words", "burstiness of sentence lengths", "sentences", 10),
    Row("punctuation_per_1000_words, L1", "punctuation_per_1000_words", "marks per 1,000 words", "words", 50),
    Row("word_length, W1", "word_length", "word length, W1 in letters", "words", 50),
    Row("type_token_ratio, L1", "type_token_ratio", f"different words in {WINDOW}", "words", 2 * WINDOW),
    Row("unigram, L2", "unigram", "token frequencies, L2", "tokens", 50),
)


@dataclass(frozen=True)
class Distance:
    """value, floor: None where `why` says why there is none."""

    label: str
    value: float | None = None
    floor: float | None = None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """value / floor, None where there is no floor above 0."""
        return self.value / self.floor if self.value is not None and self.floor else None


class Ruler:
    """Measures texts of a tokenizer (`store.fingerprint.tokenizer_fingerprint`) by a target."""

    def __init__(self, target: Target, tokenizer_sha256: str) -> None:
        self.target = target
        self.same_tokens = target.about.tokenizer_sha256 == tokenizer_sha256
        self.floor = lru_cache(1024)(self._floor)

    def __call__(self, prompt: str, text: str, ids: Sequence[int]) -> list[Distance]:
        """Of a text after its prompt, and the tokens that made it. Sentences that its ends cut off do not count."""
        counts, found = counted(prompt, text, ids, self.target.vocab_size if self.same_tokens else None)
        values = compare(found, {name: self.target[name] for name in found if name in self.target})
        return [self._distance(row, counts[row.events], values.get(row.name)) for row in ROWS]

    def _distance(self, row: Row, count: int, value: float | None) -> Distance:
        if row.statistic not in self.target:
            return Distance(row.label, why="not in the target")
        if STATISTICS[row.statistic].tokens and not self.same_tokens:
            return Distance(row.label, why="the target has other tokens")
        if count < row.fewest or value is None or not math.isfinite(value):
            return Distance(row.label, why=f"too few {row.events}: {count} of {row.fewest}")
        return Distance(row.label, value, self.floor(row, _about(count)))

    def _floor(self, row: Row, count: int) -> float:
        """Of texts with `count` of the row's events."""
        there, about = self.target[row.statistic], self.target.about
        if row.statistic == "unigram":
            return sampling_floor(there, count, max(1, about.tokens or 0))
        if row.statistic == "type_token_ratio":  # a mean over places: halves of the corpus, scaled to this size
            return self.target.noise.get(row.name, 0.0) * math.sqrt((about.words / count + 1) / 4)
        drawn = _draws(row.statistic, there, count)
        return sum(compare({row.statistic: one}, {row.statistic: there})[row.name] for one in drawn) / DRAWS


def counted(
    prompt: str, text: str, ids: Sequence[int], vocab_size: int | None = None
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """How many sentences, words and tokens there are, and their statistics as tensors of a Target."""
    one = Documents([text], np.arange(0), None, prompts=[prompt])
    lengths, words = one.sentence_lengths[0], one.words[0]
    counts = {"sentences": int(lengths.sum()), "words": len(words), "tokens": len(ids)}
    found = {}
    if counts["sentences"]:
        found["sentence_words"] = _shares(np.repeat(np.arange(len(lengths)), lengths), WORDS)
    if words:
        found["word_length"] = _shares([len(word) for word in words], LETTERS)
        found["punctuation_per_1000_words"] = torch.from_numpy(1000 * one.marks[0] / len(words))
    if len(words) >= WINDOW:
        found["type_token_ratio"] = torch.from_numpy(one.mattr)
    if ids and vocab_size is not None:
        found["unigram"] = _shares(ids, vocab_size)
    return counts, found


def _shares(values: Any, bins: int) -> Tensor:
    """A histogram, the last bin taking all above."""
    return torch.from_numpy(np.bincount(np.minimum(values, bins - 1), minlength=bins) / len(values))


def _draws(statistic: str, there: Tensor, count: int) -> Tensor:
    """[DRAWS, ...] of the statistic, of `count` words or sentences, each draw on its own."""
    generator, p = np.random.default_rng(0), there.double().numpy()
    if statistic == "punctuation_per_1000_words":
        return torch.from_numpy(generator.poisson(p * count / 1000, (DRAWS, len(p))) * 1000 / count)
    return torch.from_numpy(generator.multinomial(count, p / p.sum(), DRAWS) / count)


def _about(count: int) -> int:
    """To a tenth, by which a floor changes by a twentieth: a text that grows asks for few of them."""
    return round(1.2 ** round(math.log(count, 1.2)))
