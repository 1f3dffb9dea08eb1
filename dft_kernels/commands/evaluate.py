"""`dft-kernels evaluate`: does a model write like people, and what did it cost."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import transformers

from ..errors import fail
from ..evaluation import evaluate as work
from ..evaluation import retention, slices
from ..evaluation.findings import has_gap
from ..evaluation.intervals import FEW
from ..evaluation.results import FILE, LEVEL, Evaluation
from ..evaluation.subject import SPENT, Job, Model, check_fast
from ..evaluation.wording import labels
from ..generation import vllm_engine
from ..generation.engine import Engine
from ..generation.sampling import Sampling
from ..materials.encoders import encoder
from ..materials.questions import TASKS
from ..materials.records import Faults
from ..materials.sources import SMOLLM2, Trained, texts_of, tokenizer_of, trained_model
from ..models.heads import check_positions
from .arguments import Help, Number, Parser, Whole, device, input_file, output_folder
from .flags import (
    add_cache,
    add_only,
    add_quiet,
    add_sampling,
    add_seed,
    add_skip_bad,
    add_steps,
    add_text,
    sampled,
    settings_of,
)
from .printing import console, progress

ENGINES: dict[str, type[Engine]] = {one.name: one for one in (Engine, vllm_engine.VllmEngine)}


def parser() -> Parser:
    """The options of `dft-kernels evaluate`."""
    made = Parser(
        prog="dft-kernels evaluate",
        description="Let models go on from human prompts, and measure how far their writing lies from what people "
        "wrote there: every metric with its interval, in units of what people differ by from people. What was drawn is "
        "kept, and a run that was stopped goes on.",
        formatter_class=Help,
    )
    add = made.add_argument
    add("model", nargs="+", help="folders or names for transformers, what dft-kernels train saved, or smollm2; the "
        "first is what the others are held against")  # fmt: skip
    add_text(made, "human writing, of the kind that the models shall write and were not trained on: ", "--human",
             required=True)  # fmt: skip
    add_only(made, "is read")
    add_skip_bad(made)
    add("--out", type=output_folder, default="evaluation", metavar="DIR", help="where results and samples are written")
    add("--count", type=Whole(2), default=200, help="texts of each model; as many human ones twice")
    add("--prompt", type=Whole(1), default=32, help="tokens of a prompt")
    add("--length", type=Whole(2), default=128, help="tokens that a text has at most")
    add_sampling(made, Number(least=0), "of every model; 0: the likeliest token", min_p=True)
    add_steps(made)
    add("--compare", action="store_true", help="every model as it is beside itself with these settings")
    add_seed(made, "of passages, draws and halves")
    sweep = f"try the first model by {len(work.GRID)} ways of sampling too, and hold the others against the best one"
    add("--sweep", action="store_true", help=sweep)
    add("--slices", type=input_file, default=None, metavar="FILE", help="words that slices are chosen by, and that "
        "are swapped, in place of English ones for women and men")  # fmt: skip
    add("--counterfactual", action="store_true", help="draw again after prompts whose words are swapped, he for she")
    add("--retention", dest="tasks", nargs="*", default=None, metavar="TASK",
        help=f"ask questions too, of {', '.join(TASKS)}, or of tasks of lm-evaluation-harness where it is installed; "
        f"without names of the first {len(TASKS)}")  # fmt: skip
    add("--questions", type=Whole(1), default=200, help="of each task")
    add("--again", action="store_true", help="measure the samples that --out holds, without the models")
    add("--base", default=None, help="of adapters; by default what they were trained from")
    add("--tokenizer", default=None, help="whose tokens are counted; by default the first model's")
    add("--encoder", default="minilm", help="of texts, for MMD and MAUVE: minilm, which pip brings, a folder of "
        "sentence-transformers, or none")  # fmt: skip
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="of the models")
    add("--engine", choices=list(ENGINES), default=Engine.name, help="what draws: transformers' generate, or vLLM, "
        "where it is installed, of models that are saved whole")  # fmt: skip
    add("--batch", type=Whole(1), default=16, help="texts drawn at a time, of which the draws depend")
    add_cache(made)
    add_quiet(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Check, evaluate, print."""
    transformers.utils.logging.disable_progress_bar()
    twice = {name for name in options.model if options.model.count(name) > 1}
    if twice:
        raise ValueError(f"evaluate: model must be named once each, got {min(twice)} twice. Leave one out.")
    chosen = {name: trained_model(name, options.base) for name in options.model}
    sampling = Sampling(options.temperature, options.top_p, options.min_p, options.seed, options.length, options.count)
    settings = settings_of(options)
    if options.compare and settings == settings.plain:
        fail("evaluate", "compare", "stand beside a setting", "none", "Add one, as --diversity 0.1")
    if options.engine == vllm_engine.VllmEngine.name and not options.again:
        vllm_engine.check({name: one.adapter for name, one in chosen.items()}, sampling, settings)
    tasks = () if options.tasks is None else tuple(options.tasks or TASKS)
    if tasks:
        retention.check(tasks, options.questions)
        retention.questions_asked(tasks, options.cache, options.questions)  # fetched, before anything is drawn
    faults = Faults(options.skip_bad)
    texts = texts_of(options.human, options.cache, options.only, faults, "human")
    out = console(quiet=options.quiet)
    for line in faults.said():
        out.print(line, highlight=False)
    sources = {name: str(one.base if one.adapter else one.name) for name, one in chosen.items()}
    for name, source in sources.items():
        _check_positions(name, source, options)
        if settings.stepped and not options.again:
            settings.steps(tokenizer_of(source, options.cache))  # their mistakes, before anything is drawn
    tokenizer = tokenizer_of(options.tokenizer or sources[options.model[0]], options.cache)
    check_fast(tokenizer, options.tokenizer or options.model[0])
    ways = (settings.plain, settings) if options.compare else (settings,)
    job = Job(
        human=options.human,
        sampling=sampling,
        engine=ENGINES[options.engine],
        prompt=options.prompt,
        sweep=work.GRID if options.sweep else (),
        words=slices.read(options.slices),
        counterfactual=options.counterfactual,
        tasks=tasks,
        questions=options.questions,
        cache=options.cache,
        again=options.again,
        encoder=None if options.encoder == "none" else encoder(options.encoder, options.cache),
        batch=options.batch,
    )
    found = work.evaluate(
        job,
        texts,
        tokenizer,
        [Model(name, partial(_loaded, one, options), ways) for name, one in chosen.items()],
        options.out,
        partial(progress, quiet=options.quiet),
    )
    out.print(render(found))
    few = {name: count for name, count in found.settings["slices"].items() if count < FEW}
    if few:
        said = ", ".join(f"{name} {count}" for name, count in few.items())
        out.print(f"too few prompts for slices, of {FEW}: {said}", highlight=False, markup=False)
    out.print(f"{options.out / FILE}: dft-kernels report {options.out} draws it", highlight=False, markup=False)
    return 0


def _loaded(one: Trained, options: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = one.load(options.cache)
    return model.to(options.device), tokenizer


def _check_positions(name: str, source: str, options: argparse.Namespace) -> None:
    """Of every model, before the first one draws."""
    if source == SMOLLM2:
        return
    config = transformers.AutoConfig.from_pretrained(source)
    longest, remedy = options.prompt + options.length, f"Lower it: {name} has no more"
    check_positions(config, longest, "evaluate", "length", "be, with the prompt,", remedy)


def stopped(options: argparse.Namespace) -> str:
    """How to go on."""
    return f"what was drawn is in {options.out}, and the same command goes on"


def render(found: Evaluation) -> Any:
    """Every metric of every model, in floors, and how each was drawn: once where all were drawn alike."""
    from rich.markup import escape
    from rich.table import Table

    made = Table("metric", *map(escape, labels(found.models)), title="value / what people differ by from people")
    for at, metric in enumerate(found.metrics):
        made.add_row(metric.name, *(_cell(model.values[at], metric.kind == LEVEL) for model in found.models))
    score = [f"{model.score.value:.0f}" if model.score else "" for model in found.models]
    spent = [f"{model.cost[SPENT]:.4f}" if SPENT in model.cost else "" for model in found.models]
    made.add_row("style diversity score", *score, end_section=not any(spent))
    if any(spent):
        made.add_row(SPENT, *spent, end_section=True)
    people = " (people: {:.0f} to {:.0f})".format(*found.human_score[::2]) if found.human_score else ""
    ways = [model.sampling for model in found.models]
    about = sampled(ways[0])
    if len({sampled(way) for way in ways}) > 1:
        made.add_row(
            "temperature, top-p, min-p", *(f"{way.temperature:g}, {way.top_p:g}, {way.min_p:g}" for way in ways)
        )
        about = f"seed {ways[0].seed}"
    made.caption = f"*: a gap, beyond 95 % of human halves, whose interval excludes 0; score of 100{people}; {about}"
    return made


def _cell(value: Any, level: bool) -> str:
    if value.value is None or (value.ratio is None and not level):
        return value.note.partition(":")[0] or "no noise"
    if level:
        return f"{value.value:.4g}"
    low, high = (one / value.floor for one in (value.low, value.high))
    return f"{value.ratio:+.2f} ({low:+.2f} to {high:+.2f}){' *' if has_gap(value) else ''}"
