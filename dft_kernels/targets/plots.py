"""A target against another, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .punctuation import CLASSES
from .target import Target


def plot(target: Target, other: Target | None, path: Path) -> None:
    """Token frequencies (with `other`: log ratios over frequency), sentence lengths, hazards and punctuation, written
    to `path`. Token statistics of `other` only where it is of the same tokenizer."""
    from matplotlib.figure import Figure

    both = [target] if other is None else [target, other]
    same = [one for one in both if one.about.tokenizer_sha256 == target.about.tokenizer_sha256]
    figure = Figure(figsize=(12, 8), layout="constrained")
    frequencies, lengths, hazards, marks = figure.subplots(2, 2).flat
    _frequencies(frequencies, [one for one in same if "unigram" in one])
    for one in both:
        if "sentence_words" in one:
            lengths.step(range(len(one["sentence_words"])), one["sentence_words"], where="mid", label=one.about.name)
    lengths.set(title="sentence length", xlabel="words", ylabel="share of sentences", xlim=(0, 100))
    for one in same:
        if "hazard" in one:
            lengths_of = one["sentence_tokens"]
            seen = (lengths_of > 0)[:-1] & (lengths_of.flip(0).cumsum(0).flip(0) > 0.01)[
                :-1
            ]  # where sentences still are
            ages = torch.arange(len(seen))[seen]
            hazards.plot(ages, one["hazard"][:-1][seen], ".-", markersize=3, label=one.about.name)
    hazards.set(title="hazard of the sentence's end", xlabel="tokens before", ylabel="probability")
    width = 0.8 / len(both)
    for number, one in enumerate(both):
        if "punctuation_per_1000_words" in one:
            places = [place + number * width for place in range(len(CLASSES))]
            marks.bar(places, one["punctuation_per_1000_words"], width, label=one.about.name)
    marks.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    marks.set(title="punctuation", ylabel="per 1,000 words", yscale="log")
    for axes in (lengths, hazards, marks):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _frequencies(axes: Any, targets: list[Target]) -> None:
    if len(targets) == 2:
        p, q = (one["unigram"].double() for one in targets)
        there = (p > 0) & (q > 0)
        axes.plot(p[there], q[there] / p[there], ".", markersize=2, alpha=0.4)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(
            title=f"token frequencies: {targets[1].about.name} / {targets[0].about.name}",
            xlabel=f"frequency in {targets[0].about.name}",
            ylabel="ratio",
            xscale="log",
            yscale="log",
        )
    elif targets:
        p = targets[0]["unigram"].sort(descending=True).values
        axes.plot(range(1, 1 + int((p > 0).sum())), p[p > 0])
        axes.set(title="token frequencies", xlabel="rank", ylabel="share of tokens", xscale="log", yscale="log")
