"""An evaluation from human texts and models to its file: what is drawn, read, asked and measured, in this order.

What takes long is kept in the folder as it is done, samples/ and answers/, so that a run which is stopped goes on, and
metrics can be made again without the models.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replace_text
from ..generation.samples import draw
from ..generation.sampling import Sampling
from ..materials.encoders import embed
from ..store.fingerprint import tokenizer_fingerprint
from ..targets.corpus import encode
from ..targets.punctuation import CLASSES
from .documents import Documents
from .measure import Found, measured, standing_out, style_score, swept
from .metrics import METRICS, Sample
from .people import People, cut, people
from .reading import Reading, read
from .results import About, Accuracy, Evaluated, Evaluation, Swept, Text

CSV = "evaluation.csv"
SHOWN = 10  # texts of a model that the file keeps: the first, of prompts in random order
GRID = tuple((t, p, m) for t, p, m in (
    (0.7, 1.0, 0.0), (0.85, 1.0, 0.0), (1.0, 1.0, 0.0), (0.85, 0.9, 0.0), (1.0, 0.9, 0.0), (1.15, 0.9, 0.0),
    (1.0, 1.0, 0.05), (1.2, 1.0, 0.05),
))  # fmt: skip
Bars = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]  # name, total, unit


@dataclass(frozen=True)
class Job:
    """What to evaluate by. human: names of the texts, for the record; prompt: tokens of a prompt; sampling: of every
    model; sweep: ways of sampling (temperature, top_p, min_p) that the first model is tried by besides; encoder: of
    materials.encoders, None for none; questions: of each retention task, 0 for none."""

    human: list[str]
    sampling: Sampling = field(default_factory=Sampling)
    prompt: int = 32
    sweep: tuple[tuple[float, float, float], ...] = ()
    encoder: Any = None
    questions: int = 0
    batch: int = 16


@dataclass(frozen=True)
class _Made:
    """A model's part of the pool."""

    name: str
    sampling: Sampling
    texts: list[str]
    reading: Reading | None
    retention: list[Accuracy]
    cost: dict[str, float]


def evaluate(
    job: Job,
    texts: Sequence[str],
    tokenizer: Any,
    models: Sequence[tuple[str, Callable[[], tuple[Any, Any]]]],
    folder: Path,
    bars: Bars,
) -> Evaluation:
    """Evaluate models against human texts, write results.FILE and CSV into `folder`, and return what is in them.

    tokenizer: by whose tokens passages are cut and n-grams are counted, whatever a model's own. models: names, and
    functions that load model and tokenizer, called one after another. bars: makes progress bars."""
    from .. import __version__

    those = people(texts, tokenizer, job.prompt, job.sampling.length, job.sampling.count, job.sampling.seed)
    made, tried = [], []
    for number, (name, load) in enumerate(models):
        model, own = load()
        made.append(_written(job, those, tokenizer, name, model, own, folder, bars))
        if number == 0:
            for t, p, m in job.sweep:
                sampling = replace(job.sampling, temperature=t, top_p=p, min_p=m)
                tried.append(_drawn(job, those, tokenizer, name, model, own, sampling, folder, bars)[0])
        del model
    found = _results(job, those, tokenizer, made, tried, bars)
    settings = {
        "human": job.human, "human_sha256": those.sha256, "tokenizer": tokenizer_fingerprint(tokenizer),
        "encoder": None if job.encoder is None else job.encoder.name, "count": job.sampling.count,
        "prompt": job.prompt, "length": job.sampling.length, "seed": job.sampling.seed, "questions": job.questions,
        "versions": _versions(),
    }  # fmt: skip
    evaluation = replace(found, version=__version__, date=datetime.date.today().isoformat(), settings=settings)
    evaluation.save(folder)
    replace_text(folder / CSV, _table(evaluation))
    return evaluation


def _written(
    job: Job, those: People, tokenizer: Any, name: str, model: Any, own: Any, folder: Path, bars: Bars
) -> _Made:
    """What a model wrote, expects and knows."""
    texts, cost = _drawn(job, those, tokenizer, name, model, own, job.sampling, folder, bars)
    prompts = [passage.prompt for passage in those.all]
    with bars(f"{name}: reading", len(prompts) + len(texts), "texts") as bar:
        human = read(model, own, prompts, [passage.text for passage in those.all], tick=bar)
        reading = Reading(human, read(model, own, prompts[: len(texts)], texts, tick=bar))
    cost["parameters"] = float(sum(one.numel() for one in model.parameters()))
    return _Made(name, job.sampling, texts, reading, [], cost)


def _drawn(
    job: Job,
    those: People,
    tokenizer: Any,
    name: str,
    model: Any,
    own: Any,
    sampling: Sampling,
    folder: Path,
    bars: Bars,
) -> tuple[list[str], dict[str, float]]:
    """Texts after the reference's prompts, no longer than theirs by `tokenizer`, and what they cost."""
    prompts = [passage.prompt for passage in those.reference]
    same = tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer)
    asked = sampling if same else replace(sampling, length=_length(those, own))
    file = folder / "samples" / f"{_file_name(name)}-{_file_name(_said(sampling))}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with bars(f"{name}: writing", len(prompts), "texts") as bar:
        found = draw(model, own, prompts, asked, file, model_name=name, batch=job.batch, tick=bar)
    texts = [cut(text, tokenizer, sampling.length) for text in found.texts]
    return texts, {
        "generation seconds": found.seconds, "tokens": float(found.tokens),
        "tokens per second": found.tokens_per_second, "empty texts": float(sum(not text.strip() for text in texts)),
    }  # fmt: skip


def _length(those: People, own: Any) -> int:
    """Tokens of another tokenizer that hold as much text as any human one does."""
    return max(len(one.ids) for one in encode(own, [passage.text for passage in those.all]))


def _results(
    job: Job, those: People, tokenizer: Any, made: list[_Made], tried: list[list[str]], bars: Bars
) -> Evaluation:
    """All that is measured, of texts that are there."""
    n, human = len(those.reference), [passage.text for passage in those.all]
    pool = [*human, *(text for one in made for text in one.texts), *(text for one in tried for text in one)]
    vectors = None
    if job.encoder is not None:
        with bars("embedding", len(pool), "texts") as bar:
            vectors = embed(job.encoder, pool, tick=bar).double().numpy()
    documents = Documents(pool, np.arange(len(human)), tokenizer, vectors)
    rows = [np.arange(at, at + n) for at in range(len(human), len(pool), n)]
    samples = {one.name: Sample(documents, at, one.reading) for one, at in zip(made, rows, strict=False)}
    with bars("measuring", len(METRICS) * len(samples), "metrics") as bar:
        found = measured(samples, seed=job.sampling.seed, tick=bar)
    models = [_evaluated(those, one, samples[one.name], found[one.name], ()) for one in made]
    if tried:
        best = _best(job, made[0], samples[made[0].name], tried, rows[len(made) :], found[made[0].name], bars)
        models.append(_evaluated(those, *best))
    score = next((score for score in map(style_score, found.values()) if score is not None), None)
    about = [About(**{name: getattr(one, name) for name in About.__dataclass_fields__}) for one in METRICS]
    return Evaluation("", "", {}, about, models, [] if score is None else score[1], _histograms(documents, documents.human))


def _best(
    job: Job, first: _Made, sample: Sample, tried: list[list[str]], rows: list[Any], found: list[Found], bars: Bars
) -> tuple[_Made, Sample, list[Found], tuple[Swept, ...]]:
    """Of the ways of sampling that the first model was tried by, its own among them, the one nearest to people."""
    samplings = [job.sampling] + [replace(job.sampling, temperature=t, top_p=p, min_p=m) for t, p, m in job.sweep]
    samples = [sample, *(Sample(sample.documents, at) for at in rows)]
    sweep = tuple(Swept(how, *swept(found, one)) for how, one in zip(samplings, samples, strict=True))
    at = min(range(len(sweep)), key=lambda at: sweep[at].distance)
    texts = [first.texts, *tried][at]
    name = f"{first.name}, best of {len(sweep)} samplings"
    made = replace(first, name=name, sampling=samplings[at], texts=texts, reading=None, retention=[], cost={})
    with bars("measuring", len(METRICS), "metrics") as bar:
        return made, samples[at], measured({name: samples[at]}, seed=job.sampling.seed, tick=bar)[name], sweep


def _evaluated(
    those: People, made: _Made, sample: Sample, found: list[Found], sweep: tuple[Swept, ...] = ()
) -> Evaluated:
    score = style_score(found)
    return Evaluated(
        name=made.name,
        sampling=made.sampling,
        values=[one.value for one in found],
        score=None if score is None else score[0],
        retention=made.retention,
        phrases=standing_out(sample.documents, sample.rows),
        texts=[Text(p.prompt, t, p.text) for p, t in zip(those.reference[:SHOWN], made.texts, strict=False)],
        slices=[],
        sweep=list(sweep),
        histograms=_histograms(sample.documents, sample.rows),
        cost=made.cost,
    )


def _histograms(documents: Documents, rows: Any) -> dict[str, list[float]]:
    def shares(counts: Any) -> list[float]:
        total = counts[rows].sum(0)
        return (total / max(1, total.sum())).tolist()

    return {"sentence words": shares(documents.sentence_lengths), "punctuation": shares(documents.marks)}


def _said(sampling: Sampling) -> str:
    return f"t{sampling.temperature:g}-p{sampling.top_p:g}-m{sampling.min_p:g}"


def _file_name(name: str) -> str:
    """Of a model: what a file can be called, and no two models alike."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "numpy", "nupunkt", "lexicalrichness")}


def _table(evaluation: Evaluation) -> str:
    """A row a metric and model, with all that the figure depends on."""
    out, about = io.StringIO(), {one.name: one for one in evaluation.metrics}
    rows: Iterator[dict[str, Any]] = (
        {
            **{"model": model.name, "group": about[value.metric].group, "unit": about[value.metric].unit},
            **asdict(value), "ratio": value.ratio, **asdict(model.sampling), "date": evaluation.date,
            "prompt": evaluation.settings["prompt"], "human_sha256": evaluation.settings["human_sha256"],
        }
        for model in evaluation.models
        for value in model.values
    )  # fmt: skip
    listed = list(rows)
    writer = csv.DictWriter(out, list(listed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()
