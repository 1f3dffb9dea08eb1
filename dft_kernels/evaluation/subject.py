"""What one model contributes to an evaluation: its texts, what it expects, what it knows.

All of it takes the model and takes long, so that it is kept in the folder as it is done: samples/ (JSON lines, a text
each), answers/ (a question each), readings/ (JSON, sums a text). A run that is stopped goes on, and metrics can be made
again without the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import fail
from ..files import Source, replace_text
from ..generation import samples
from ..generation.engine import Engine
from ..generation.sampling import Sampling
from ..generation.settings import Settings, described, said
from ..store.fingerprint import model_fingerprint, tokenizer_fingerprint
from ..targets.corpus import encode
from . import slices
from .people import People, cut
from .reading import Read, Reading, read
from .results import Accuracy
from .retention import answered, questions_asked, retention

Bars = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]  # name, total, unit
Load = Callable[[], tuple[Any, Any]]
SPENT = "KL from the model, nats a token"  # of Subject.cost, where steps were in use


@dataclass(frozen=True)
class Model:
    """A model to evaluate. load: gives model and tokenizer; ways: how it draws, each a subject of its own, of which
    temperature, top_p and min_p count in place of the job's. (): one, as the job's sampling says."""

    name: str
    load: Load
    ways: tuple[Settings, ...] = ()


@dataclass(frozen=True)
class Job:
    """What to evaluate by. human: names of the texts, for the record; prompt: tokens of a prompt; sampling: of every
    model without `ways`; engine: what draws; sweep: ways of sampling (temperature, top_p, min_p) that the first model
    is tried by besides, its first steps in use; encoder: of materials.encoders, None for none; words: of slices;
    counterfactual: draw after swapped prompts too; tasks: of retention, so many questions of each, fetched into
    `cache`; again: measure what the folder holds, without models."""

    human: list[str]
    sampling: Sampling = field(default_factory=Sampling)
    engine: type[Engine] = Engine
    prompt: int = 32
    sweep: tuple[tuple[float, float, float], ...] = ()
    encoder: Any = None
    words: slices.Words = field(default_factory=slices.read)
    counterfactual: bool = False
    tasks: tuple[str, ...] = ()
    questions: int | None = None
    cache: Path = Path()
    batch: int = 16
    again: bool = False

    def swept(self, of: Sampling) -> Iterator[Sampling]:
        """The ways of sampling of the sweep, but for that of the first subject."""
        for temperature, top_p, min_p in self.sweep:
            one = replace(self.sampling, temperature=temperature, top_p=top_p, min_p=min_p)
            if one != of:
                yield one


@dataclass(frozen=True)
class Subject:
    """name: the model's and its steps; texts: after the reference's prompts; swapped: after `swapped_prompts`, those of
    the prompts `swapped_at` with their words swapped; tried: texts by each sampling of the sweep; drawn: what texts
    depend on besides."""

    name: str
    sampling: Sampling
    texts: list[str]
    swapped: list[str] = field(default_factory=list)
    swapped_at: list[int] = field(default_factory=list)
    swapped_prompts: list[str] = field(default_factory=list)
    tried: list[list[str]] = field(default_factory=list)
    reading: Reading | None = None
    retention: list[Accuracy] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)


def gathered(
    job: Job, those: People, tokenizer: Any, one: Model, folder: Path, bars: Bars, *, sweep: bool = False
) -> list[Subject]:
    """All of a model, a subject for each way that it draws; it is loaded, once, unless `again`. tokenizer: by which
    texts are cut to one length; sweep: of the first way."""
    model, own = (None, None) if job.again else one.load()
    if own is not None:
        check_fast(own, one.name)
    given = one.ways or (Settings().by(job.sampling),)
    ways = [_Way.of(one.name, settings, job.sampling) for settings in given]
    prompts = [passage.prompt for passage in those.reference]
    other = [slices.swapped(prompt, job.words) for prompt in prompts] if job.counterfactual else prompts
    at = [number for number, (a, b) in enumerate(zip(prompts, other, strict=True)) if a != b]
    other = [other[number] for number in at]

    engine = None if job.again else job.engine(model, own)

    def drawn(prompts: list[str], way: _Way, part: str = "") -> samples.Samples:
        file = folder / "samples" / f"{way.file}{part}.jsonl"
        if engine is None:
            return _read_again(job, file, prompts, way)
        file.parent.mkdir(parents=True, exist_ok=True)
        same = tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer)
        length = job.sampling.length if same else _length(those, own)
        asked = replace(way.sampling, count=len(prompts), length=length)
        with bars(f"{way.name}: writing", len(prompts), "texts") as bar:
            return samples.draw(
                engine, prompts, asked, file, model_name=one.name, settings=way.settings, batch=job.batch, tick=bar
            )

    def texts(found: samples.Samples) -> list[str]:
        return [cut(text, tokenizer, job.sampling.length) for text in found.texts]

    made: list[Subject] = []
    if engine is not None:  # whatever one of them is refused for, before any of them draws
        for way in ways:
            engine.check(way.sampling, way.settings)
    with nullcontext() if engine is None else closing(engine):
        for number, way in enumerate(ways):
            found = drawn(prompts, way)
            swapped = texts(drawn(other, way, "-swapped")) if at else []
            by = job.swept(way.sampling) if sweep and number == 0 else ()
            tried = [texts(drawn(prompts, _Way.of(one.name, way.settings.by(sampling), sampling))) for sampling in by]
            written = texts(found)
            cost = {
                "generation seconds": found.seconds, "tokens": float(found.tokens),
                "tokens per second": found.tokens_per_second,
                "empty texts": float(sum(not text.strip() for text in written)),
            }  # fmt: skip
            if found.kl is not None:
                cost[SPENT] = found.kl
            depends = ("batch", "device", "engine", "generation", "model_sha256", "versions", "steps")
            of = {name: getattr(found.header, name) for name in depends[: None if way.steps else -1]}
            made.append(Subject(way.name, way.sampling, written, swapped, at, other, tried, cost=cost, drawn=of))
    knows = _retention(job, one.name, model, own, folder, bars)
    for number, (way, subject) in enumerate(zip(ways, made, strict=True)):
        human = made[0].reading.human if number and made[0].reading else None
        reading = _reading(job, those, way, model, own, subject.texts, folder, bars, human)
        made[number] = replace(subject, reading=reading, retention=knows)
    return made


@dataclass(frozen=True)
class _Way:
    """How a model draws. name: of the subject; file: of its samples and readings; steps: of `described`."""

    name: str
    file: str
    sampling: Sampling
    settings: Settings
    steps: dict[str, Any]

    @classmethod
    def of(cls, model: str, settings: Settings, sampling: Sampling) -> _Way:
        """sampling: whose seed, length and count these are."""
        if settings.beams != 1:
            fail("evaluate", "ways", "draw", f"{settings.beams} beams, which draw nothing", "Leave them out")
        chosen = replace(sampling, temperature=settings.temperature, top_p=settings.top_p, min_p=settings.min_p)
        steps = described(settings)
        shown, file = said(steps), f"{file_name(model)}-{samples_name(chosen)}"
        if steps:
            file += f"-{hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()[:8]}"
        return cls(f"{model} + {shown}" if steps else model, file, chosen, settings, steps)


def check_fast(tokenizer: Any, of: str) -> None:
    """ValueError for a tokenizer that does not know where its tokens stand in a text."""
    if not getattr(tokenizer, "is_fast", False):
        got = f"{type(tokenizer).__name__} of {of}"
        fail(
            "evaluate",
            "tokenizer",
            "be a fast one, which knows a token's characters",
            got,
            "Convert it, or name another",
        )


def _read_again(job: Job, file: Path, prompts: Sequence[str], way: _Way) -> samples.Samples:
    """The texts of a file, which must be those that the run would draw."""
    found = samples.read(file)
    source = Source("evaluate", file, "Evaluate without --again")
    if found.prompts != list(prompts):
        source.fail("prompts", "be those of this run", "others")
    was = replace(found.header.sampling, count=way.sampling.count, length=way.sampling.length)
    if was != way.sampling:
        source.fail("sampling", f"be {way.sampling}", str(was))
    if found.header.steps != way.steps:
        source.fail("steps", f"be {json.dumps(way.steps)}", json.dumps(found.header.steps))
    if found.header.engine != job.engine.name:
        source.fail("engine", f"be {job.engine.name}", found.header.engine, "Name that one")
    return found


def _reading(
    job: Job, those: People, way: _Way, model: Any, own: Any, written: list[str], folder: Path, bars: Bars,
    human: Read | None,
) -> Reading:  # fmt: skip
    """What the model expects of human texts and of its own, read once. human: that, where it is known."""
    file, people = folder / "readings" / f"{way.file}.json", those.all
    prompts, texts = [passage.prompt for passage in people], [passage.text for passage in people]
    of = hashlib.sha256(json.dumps([prompts, texts, written]).encode()).hexdigest()
    source = Source("evaluate", file, "Delete it: it is made again", "Evaluate without --again first")
    if job.again or file.exists():
        kept = source.record(_Kept, source.json(1 << 26))
        if kept.texts_sha256 == of and (job.again or kept.model_sha256 == model_fingerprint(model)):
            return Reading(*(Read(*map(np.array, (one["tokens"], one["cross_entropy"], one["entropy"]))) for one in
                             (kept.human, kept.own)))  # fmt: skip
        if job.again:
            source.fail("texts_sha256", "be of the texts of this run", "others", "Evaluate without --again")
    with bars(f"{way.name}: reading", (0 if human is not None else len(people)) + len(written), "texts") as bar:
        human = read(model, own, prompts, texts, tick=bar) if human is None else human
        reading = Reading(human, read(model, own, prompts[: len(written)], written, tick=bar))
    listed = [{key: value.tolist() for key, value in vars(one).items()} for one in (reading.human, reading.own)]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(asdict(_Kept(model_fingerprint(model), of, *listed))))
    return reading


def _retention(job: Job, name: str, model: Any, own: Any, folder: Path, bars: Bars) -> list[Accuracy]:
    """What the model knows; without the model, what the run before found."""
    file = folder / "answers" / f"{file_name(name)}.jsonl"
    if not job.tasks or (job.again and not file.exists()):
        return []
    if job.again:
        return answered(job.tasks, job.cache, file, job.questions, job.sampling.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with bars(f"{name}: answering", questions_asked(job.tasks, job.cache, job.questions), "questions") as bar:
        return retention(
            model, own, job.tasks, job.cache, file, model_name=name, count=job.questions, seed=job.sampling.seed,
            tick=bar,
        )  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    """A file of readings/: sums by text, of `Read`."""

    model_sha256: str
    texts_sha256: str
    human: dict[str, list[float]]
    own: dict[str, list[float]]


def _length(those: People, own: Any) -> int:
    """Tokens of another tokenizer that hold as much text as any human one does."""
    return max(len(one.ids) for one in encode(own, [passage.text for passage in those.all]))


def samples_name(sampling: Sampling) -> str:
    """A way of sampling, in the name of a file."""
    return f"t{sampling.temperature:g}-p{sampling.top_p:g}-m{sampling.min_p:g}"


def file_name(name: str) -> str:
    """Of a model: what a file can be called, and no two models alike."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return plain if plain == name else f"{plain}-{digest[:8]}"
