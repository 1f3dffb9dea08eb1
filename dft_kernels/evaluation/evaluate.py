"""An evaluation from human texts and models to its file: what is drawn, read, asked and measured, in this order."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..files import replace_text
from ..generation.sampling import Sampling
from ..generation.settings import said
from ..materials.encoders import embed
from ..store.fingerprint import tokenizer_fingerprint
from ..targets.punctuation import CLASSES
from ..targets.target import WORDS
from . import slices
from .documents import Documents
from .measure import Found, measured, standing_out, style_score, swept
from .metrics import METRICS, Sample, Statistic
from .people import People, people
from .results import About, Evaluated, Evaluation, Slice, Swept, Text
from .subject import Bars, Job, Model, Subject, gathered
from .wording import labels

CSV = "evaluation.csv"
SHOWN = 10  # texts of a model that the file keeps: the first, of prompts in random order
GRID = (  # temperature, top_p, min_p of a sweep
    (0.7, 1.0, 0.0), (0.85, 1.0, 0.0), (1.0, 1.0, 0.0), (0.85, 0.9, 0.0), (1.0, 0.9, 0.0), (1.15, 0.9, 0.0),
    (1.0, 1.0, 0.05), (1.2, 1.0, 0.05),
)  # fmt: skip


def evaluate(
    job: Job,
    texts: Sequence[str],
    tokenizer: Any,
    models: Sequence[Model],
    folder: Path,
    bars: Bars,
) -> Evaluation:
    """Evaluate models against human texts, write results.FILE and CSV into `folder`, and return what is in them.

    tokenizer: by whose tokens passages are cut and n-grams are counted, whatever a model's own. models: loaded one
    after another. bars: makes progress bars."""
    those = people(texts, tokenizer, job.prompt, job.sampling.length, job.sampling.count, job.sampling.seed)
    folder.mkdir(parents=True, exist_ok=True)
    by_words = slices.slices_of([passage.prompt for passage in those.reference], job.words)
    subjects: list[Subject] = []
    for one in models:
        subjects += gathered(job, those, tokenizer, one, folder, bars, sweep=bool(job.sweep) and not subjects)
    found = _results(job, those, tokenizer, subjects, bars)
    settings = {
        "human": job.human, "human_sha256": those.sha256, "tokenizer": tokenizer_fingerprint(tokenizer),
        "encoder": None if job.encoder is None else job.encoder.name, "count": job.sampling.count,
        "prompt": job.prompt, "length": job.sampling.length, "seed": job.sampling.seed,
        "tasks": list(job.tasks), "questions": job.questions,
        "slices": {name: len(rows) for name, rows in by_words.items()}, "words_sha256": job.words.sha256,
        **{name: version(name) for name in ("torch", "transformers", "numpy", "nupunkt", "lexicalrichness")},
    }  # fmt: skip
    evaluation = replace(found, version=__version__, date=datetime.date.today().isoformat(), settings=settings)
    evaluation.save(folder)
    replace_text(folder / CSV, _table(evaluation))
    return evaluation


def _results(job: Job, those: People, tokenizer: Any, subjects: list[Subject], bars: Bars) -> Evaluation:
    """All that is measured, of texts that are there."""
    n, pool = len(those.reference), [passage.text for passage in those.all]

    def placed(texts: list[str]) -> Any:
        """Rows of texts, put at the end of the pool."""
        pool.extend(texts)
        return np.arange(len(pool) - len(texts), len(pool))

    rows = [placed(one.texts) for one in subjects]
    tried = [placed(texts) for texts in subjects[0].tried]
    swapped = [placed(one.swapped) for one in subjects]
    written = [passage.prompt for passage in those.reference]
    prompts = [*(passage.prompt for passage in those.all), *written * (len(subjects) + len(tried))]
    prompts += [one for subject in subjects for one in subject.swapped_prompts]
    vectors = None
    if job.encoder is not None:
        with bars("embedding", len(pool), "texts") as bar:
            vectors = embed(job.encoder, pool, tick=bar).double().numpy()
    documents = Documents(pool, np.arange(len(those.all)), tokenizer, vectors, prompts)
    samples = [Sample(documents, at, one.reading) for one, at in zip(subjects, rows, strict=True)]
    with bars("measuring", len(METRICS) * len(samples), "metrics") as bar:
        by_number = measured({str(at): one for at, one in enumerate(samples)}, seed=job.sampling.seed, tick=bar)
    found = list(by_number.values())
    models = []
    for at, one in enumerate(subjects):
        with bars(f"{one.name}: slices", len(METRICS), "metrics") as bar:
            of = _slices(job, those, samples[at], swapped[at], one.swapped_at, bar)
        models.append(_evaluated(those, one, samples[at], found[at], of))
    if tried:
        best = _swept(job, those, subjects[0], samples[0], tried, found[0], bars, models[0])
        models = [*best, *models[1:]]
    score = next((score for score in map(style_score, found) if score is not None), None)
    about = [About(**{each.name: getattr(one, each.name) for each in fields(About)}) for one in METRICS]
    human = _histograms(documents, np.arange(n))
    return Evaluation("", "", {}, about, models, [] if score is None else score[1], human)


def _slices(job: Job, those: People, sample: Sample, swapped: Any, swapped_at: list[int], tick: Any) -> list[Slice]:
    """Every statistic between slices of the prompts, and between prompts as they stand and swapped."""
    prompts, out = [passage.prompt for passage in those.reference], []
    by_words = slices.slices_of(prompts, job.words)
    for metric in METRICS:
        if isinstance(metric, Statistic) and not metric.missing(sample):
            made = partial(
                slices.difference, metric.name, partial(metric.of, sample.documents), halves=metric.halves,
                seed=job.sampling.seed,
            )  # fmt: skip
            for first, second in combinations(by_words, 2):
                a, b = by_words[first], by_words[second]
                if metric.sized:
                    a, b = (side[: min(len(a), len(b))] for side in (a, b))
                out.append(made((first, second), (sample.rows[a], sample.rows[b]), (a, b)))
            if len(swapped):
                out.append(made(("as written", "swapped"), (sample.rows[swapped_at], swapped), None))
        tick(1)
    return [one for one in out if one is not None]


def _swept(
    job: Job,
    those: People,
    first: Subject,
    sample: Sample,
    tried: list[Any],
    found: list[Found],
    bars: Bars,
    plain: Evaluated,
) -> list[Evaluated]:
    """The first model by the best of its ways of sampling, `plain` among them, before what it is as asked for: others
    have that to beat. Chosen on the same texts as it is measured on, it looks a little better than it is."""
    ways: list[Sampling] = [first.sampling, *job.swept(first.sampling)]
    samples = [sample, *(Sample(sample.documents, at) for at in tried)]
    sweep = [Swept(how, *swept(found, one)) for how, one in zip(ways, samples, strict=True)]
    known = [(one.distance, at) for at, one in enumerate(sweep) if one.distance is not None]
    at = min(known)[1] if known else 0
    if at == 0:
        return [replace(plain, sweep=sweep)]
    name = f"{first.name}, best of {len(sweep)} samplings"
    with bars("measuring", len(METRICS), "metrics") as bar:
        best = measured({name: samples[at]}, seed=job.sampling.seed, tick=bar)[name]
    made = Subject(name, ways[at], first.tried[at - 1], retention=first.retention, drawn=first.drawn)
    return [replace(_evaluated(those, made, samples[at], best, []), sweep=sweep), plain]


def _evaluated(those: People, made: Subject, sample: Sample, found: list[Found], of: list[Slice]) -> Evaluated:
    score = style_score(found)
    return Evaluated(
        name=made.name,
        sampling=made.sampling,
        values=[one.value for one in found],
        score=None if score is None else score[0],
        retention=made.retention,
        phrases=standing_out(sample.documents, sample.rows),
        texts=[Text(p.prompt, t, p.text) for p, t in zip(those.reference[:SHOWN], made.texts, strict=False)],
        slices=of,
        sweep=[],
        histograms=_histograms(sample.documents, sample.rows),
        cost=made.cost,
        drawn=made.drawn,
    )


def _histograms(documents: Documents, rows: Any) -> dict[str, list[float]]:
    """Shares, in as many bins whatever the pool holds: runs are shown together."""

    def shares(counts: Any, bins: int) -> list[float]:
        total = np.zeros(max(bins, counts.shape[1]))
        total[: counts.shape[1]] = counts[rows].sum(0)
        total[bins - 1] = total[bins - 1 :].sum()
        return (total[:bins] / max(1, total[:bins].sum())).tolist()

    lengths, marks = shares(documents.sentence_lengths, WORDS), shares(documents.marks, len(CLASSES))
    return {"sentence words": lengths, "punctuation": marks}


def _table(evaluation: Evaluation) -> str:
    """A row a metric and model, no two of one name, with all that the figure depends on."""
    out, about = io.StringIO(), {one.name: one for one in evaluation.metrics}
    rows = [
        {
            "model": label, "metric": value.metric, "group": about[value.metric].group,
            **{name: getattr(value, name) for name in ("value", "low", "high", "floor", "ratio", "p", "note")},
            "of_model": value.model, "of_human": value.human, "unit": about[value.metric].unit,
            **asdict(model.sampling), "steps": said(model.drawn.get("steps", {})),
            **{name: evaluation.settings[name] for name in ("prompt", "human_sha256")},
            "date": evaluation.date,
        }
        for label, model in zip(labels(evaluation.models), evaluation.models, strict=True)
        for value in model.values
    ]  # fmt: skip
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
