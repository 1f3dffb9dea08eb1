"""Every metric of a model's texts against human ones, with its noise floor and its interval.

reference: n human texts that go on from the prompts which the model was given; control: other human texts of the same
kind. Two sorts of random halves, HALVES of each, the same for all metrics and models:

floor     of reference and control together, split into two sides as large as the model's: 95 % of what people differ
          by from people lies within it. As exact as a permutation test, of texts that are exchangeable.
interval  half of the prompts, the model's texts and the reference ones: how far the metric of a half lies off from the
          mean of the halves, which for n / 2 of n is distributed as the metric itself is (the delete-d jackknife's
          variance at d = n / 2: Shao and Wu, Annals of Statistics 17(3), 1989). Texts are never drawn twice, since
          repetition is what several metrics measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .documents import Documents, Rows, phrases
from .intervals import FEW, MASS, interval, quantiles
from .metrics import METRICS, Metric, Sample
from .results import DISTANCE, Phrase, Score, Value

RARE = 30  # of what a metric counts, in the human texts and a model's, below which halves do not say how it varies
_SEEN = 5  # texts that a phrase must stand in, of the model's or of the human ones


@dataclass(frozen=True)
class Halves:
    """Random halves of documents. human: pairs of rows of two sides, both of human text; prompts: numbers of half of
    the prompts [., n // 2]."""

    human: list[tuple[Rows, Rows]]
    prompts: Any

    @classmethod
    def draw(cls, people: int, n: int, count: int, seed: int) -> Halves:
        """count of each. people: human texts, of which the first n are the reference."""
        generator, size = np.random.default_rng(seed), min(n, people // 2)
        orders = [generator.permutation(people) for _ in range(count)]
        prompts = np.stack([np.sort(generator.permutation(n)[: n // 2]) for _ in range(count)])
        return cls([(order[:size], order[size : 2 * size]) for order in orders], prompts)


@dataclass(frozen=True)
class Found:
    """A metric of a model. spread: its value by halves of the prompts, about the whole's; noise: between human halves;
    both are empty where there is no number."""

    metric: Metric
    value: Value
    spread: Any  # [R]
    noise: Any  # [R]


def measured(
    samples: Mapping[str, Sample],
    *,
    metrics: Sequence[Metric] = METRICS,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, list[Found]]:
    """Every metric of each model, in the order of the table. samples: by model, all of one pool and one number of
    texts. tick: told of each metric of a model that is done."""
    out: dict[str, list[Found]] = {name: [] for name in samples}
    if not samples:
        return out
    first = next(iter(samples.values()))
    n, people = len(first.rows), len(first.documents.human)
    halves = Halves.draw(people, n, max((metric.halves for metric in metrics), default=1), seed)
    for metric in metrics:
        shared: Any = None  # the noise, where it is the same for every model
        for name, sample in samples.items():
            found = _found(metric, sample, halves, seed, shared)
            out[name].append(found)
            shared = None if metric.own_noise or found.value.note else found.noise
            if tick is not None:
                tick(1)
    return out


def _found(metric: Metric, sample: Sample, halves: Halves, seed: int, noise: Any) -> Found:
    n, empty = len(sample.rows), np.zeros(0)
    if metric.counts is not None:
        counted = metric.counts(sample.documents)
        n = int(min(counted[rows].sum() for rows in (sample.rows, np.arange(n))))

    def none(note: str) -> Found:
        return Found(metric, Value(metric.name, None, None, None, None, None, None, None, n, note), empty, empty)

    if missing := metric.missing(sample):
        return none(missing)
    if n < FEW:
        return none(f"too few: {n} documents that it can be taken of, of {FEW} that an interval takes")
    if metric.events is not None:
        seen = int(metric.events(sample.documents)[np.concatenate([sample.documents.human, sample.rows])].sum())
        if seen < RARE:
            return none(f"too few: {seen} in all texts of both sides, of {RARE} that a floor takes")
    value, model, human = metric.at(sample, np.arange(len(sample.rows)))
    spread = np.array([metric.at(sample, half)[0] for half in halves.prompts[: metric.halves]])
    if noise is None:
        noise = np.array([metric.noise(sample, *pair) for pair in halves.human[: metric.halves]])
        noise = noise - noise.mean() if metric.centred else noise
    if not np.isfinite([value, *spread, *noise]).all():
        return none("too few: documents, or halves of them, hold nothing that it is taken of")
    low, high = interval(value, spread)
    spread = value + spread - spread.mean()
    floor = float(quantiles(noise if metric.kind == DISTANCE else np.abs(noise), MASS))
    p = metric.p(sample, seed)
    return Found(
        metric, Value(metric.name, value, float(low), float(high), floor, model, human, p, n, ""), spread, noise
    )


def swept(found: Sequence[Found], sample: Sample) -> tuple[float | None, int]:
    """Of other texts, by the floors that were found: mean of abs(value) / floor over the metrics of texts, and how many
    lie beyond theirs; None where there is nothing to compare."""
    every = np.arange(len(sample.rows))
    those = [one for one in found if one.value.floor and not one.metric.own_noise]
    ratios = np.array([abs(one.metric.at(sample, every)[0]) / float(one.value.floor or 1) for one in those])
    ratios = ratios[np.isfinite(ratios)]
    return (float(ratios.mean()) if len(ratios) else None), int((ratios > 1).sum())


def style_score(found: Sequence[Found]) -> tuple[Score, list[float]] | None:
    """100 * mean of exp(-abs(s - s_human) / SD) over the statistics of style, SD the standard deviation of the same
    difference between human halves; and 5 %, 50 %, 95 % of the score of human halves, about 52 where differences are
    normal. A band and not a maximum: less noise than people make between them is not better. None without any.

    There is no published definition; this one is this package's."""
    those = [one for one in found if one.metric.style and len(one.noise) and one.noise.std() > 0]
    if not those:
        return None
    scales, drawn = [one.noise.std() for one in those], min(len(one.noise) for one in those)

    def scored(differences: Any) -> Any:
        """Parts [M, .] of differences by metric."""
        return np.stack([np.exp(-np.abs(d) / scale) for d, scale in zip(differences, scales, strict=True)])

    parts = scored([np.array([one.value.value]) for one in those])[:, 0]
    named = {one.metric.name: float(part) for one, part in zip(those, parts, strict=True)}
    spread = scored([one.spread[:drawn] for one in those]).mean(0)
    low, high = (100 * min(1.0, max(0.0, float(x))) for x in interval(parts.mean(), spread))
    people = 100 * quantiles(scored([one.noise[:drawn] for one in those]).mean(0), (0.05, 0.5, 0.95))
    return Score(float(100 * parts.mean()), low, high, named), people.tolist()


def standing_out(documents: Documents, rows: Rows, *, count: int = 20, seed: int = 0) -> list[Phrase]:
    """Words and phrases of up to three words that the texts in `rows` hold more often than the human ones, and less
    often: at most `count` of each, those whose 95 % interval over documents excludes 1, by how far it does.

    ratio: (c + 1/2) / (words + 1) of the model's over that of the human texts. Only what five texts of a side hold is
    asked; of so many intervals 5 % exclude 1 by chance alone."""
    human = documents.human
    counts, names = documents.kept(phrases, lambda: phrases(documents.words))
    seen = [np.asarray((counts[side] > 0).sum(0)).reshape(-1) for side in (rows, human)]
    columns = np.flatnonzero((seen[0] >= _SEEN) | (seen[1] >= _SEEN * len(human) / max(1, len(rows))))
    if not len(columns) or len(rows) < FEW:
        return []
    table, words = counts[:, columns].toarray(), documents.word_counts

    def logs(side: Rows, other: Rows) -> Any:
        rates = [np.log((table[s].sum(0) + 0.5) / (words[s].sum() + 1)) for s in (side, other)]
        return rates[0] - rates[1]

    generator, whole = np.random.default_rng(seed), logs(rows, human)
    halves = np.stack([
        logs(*(side[generator.permutation(len(side))[: len(side) // 2]] for side in (rows, human))) for _ in range(100)
    ])  # fmt: skip
    low, high = interval(whole, halves)
    out = []
    for order, out_of in ((np.argsort(-low), low > 0), (np.argsort(high), high < 0)):
        for at in [at for at in order if out_of[at]][:count]:
            column = table[:, at]
            ratio, least, most = (float(np.exp(x[at])) for x in (whole, low, high))
            times = int(column[rows].sum()), int(column[human].sum())
            out.append(Phrase(names[columns[at]], ratio, least, most, *times))
    return out
