"""What an evaluation found, as a file: evaluation.json, which `dft-kernels report` draws."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import fail
from ..files import Source, replace_text
from ..generation.sampling import Sampling

FILE, FORMAT = "evaluation.json", 1
LIMIT = 64 << 20  # bytes of one
DIFFERENCE, DISTANCE, LEVEL = "difference", "distance", "level"
SAME = ("human_sha256", "tokenizer", "encoder", "count", "prompt", "length", "seed")  # of runs that are shown together


@dataclass(frozen=True)
class About:
    """A metric: what is measured and how. kind: DIFFERENCE: signed, the model's statistic less the human one;
    DISTANCE: not below 0, where 0 is the same; LEVEL: the model's alone, which no human text has."""

    name: str
    group: str
    kind: str
    unit: str
    formula: str
    source: str


@dataclass(frozen=True)
class Value:
    """One metric of one model. value, low, high: with its 95 % interval over documents. floor: what 95 % of random
    halves of human text of this size stay within. model, human: the statistics themselves, None of a distance.
    p: of a permutation test. note: why there is no number, else ""."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    model: float | None
    human: float | None
    p: float | None
    documents: int
    note: str

    @property
    def ratio(self) -> float | None:
        """value / floor, None without."""
        return None if self.value is None or not self.floor else self.value / self.floor


@dataclass(frozen=True)
class Score:
    """The style diversity score, 0 to 100, its interval over documents, and its parts by metric, 0 to 1."""

    value: float
    low: float
    high: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Accuracy:
    """A multiple-choice or last-word task. normalised: by length, as the standard harness does; None where a task has
    no such. error: standard error of `accuracy`."""

    task: str
    questions: int
    of: int  # that the task has
    accuracy: float
    error: float
    normalised: float | None


@dataclass(frozen=True)
class Phrase:
    """A word or phrase that a model writes more often than people (ratio > 1) or less often. low, high: of the ratio,
    95 % over documents; counts: in the texts of the model, and in the human ones."""

    phrase: str
    ratio: float
    low: float
    high: float
    model_count: int
    human_count: int


@dataclass(frozen=True)
class Text:
    """One prompt of the test, what the model wrote after it, and what a person did."""

    prompt: str
    model: str
    human: str


@dataclass(frozen=True)
class Slice:
    """One metric's difference between two slices of the documents, model's and human, with intervals. whose: "model"
    where the model's differs from 0 and from the human one, "target" where the human one does and the model follows
    it, "" where there is none."""

    first: str
    second: str
    metric: str
    documents: list[int]  # of each
    model: float
    model_low: float
    model_high: float
    human: float | None  # of counterfactual pairs there is none
    human_low: float | None
    human_high: float | None
    whose: str


@dataclass(frozen=True)
class Swept:
    """One way of sampling of a sweep. distance: mean of abs(value) / floor over the metrics of texts, None without any
    floor; gaps: how many are beyond it."""

    sampling: Sampling
    distance: float | None
    gaps: int


@dataclass(frozen=True)
class Evaluated:
    """One model by one way of sampling. histograms: shares, "sentence words" by words of a sentence and "punctuation"
    by class; sweep: of the ways of sampling that this one is the best of; cost: "generation seconds", "tokens per
    second", "tokens", "empty texts"; drawn: what the texts depend on besides: engine, batch, device, what the model's
    own generation_config sets, versions."""

    name: str
    sampling: Sampling
    values: list[Value]
    score: Score | None
    retention: list[Accuracy]
    phrases: list[Phrase]
    texts: list[Text]
    slices: list[Slice]
    sweep: list[Swept]
    histograms: dict[str, list[float]]
    cost: dict[str, float]
    drawn: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A run. settings: all that its figures depend on, by name. human_score: 5 %, 50 %, 95 % of the style diversity
    score of human text; human_histograms: as a model's."""

    version: str
    date: str
    settings: dict[str, Any]
    metrics: list[About]
    models: list[Evaluated]
    human_score: list[float]
    human_histograms: dict[str, list[float]]

    def save(self, folder: Path) -> None:
        """Write FILE whole, or leave the one before."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, allow_nan=False)
        replace_text(folder / FILE, text)


def load(path: Path) -> Evaluation:
    """The evaluation of a folder, or of a file; ValueError by file and field where it is damaged."""
    file = path if path.suffix == ".json" else path / FILE
    source = Source("report", file, "Run dft-kernels evaluate again", "Name a folder that dft-kernels evaluate wrote")
    whole = source.json(LIMIT)
    found = source.typed("format", whole.pop("format", None), int)
    if found != FORMAT:
        source.fail("format", f"be {FORMAT}", found, "Update dft-kernels, or evaluate again")
    return source.record(Evaluation, whole)


def together(runs: Iterable[Evaluation]) -> Evaluation:
    """One evaluation of the models of several, where all were held against the same human text in the same way;
    ValueError names the setting that differs."""
    first, *others = runs
    for other in others:
        for name in SAME:
            if (was := first.settings.get(name)) != (got := other.settings.get(name)):
                fail(
                    "report", "run", f"have the {name} of the first, {was}", got, "Evaluate both alike, or report each"
                )
    return replace(first, models=[model for run in (first, *others) for model in run.models])
