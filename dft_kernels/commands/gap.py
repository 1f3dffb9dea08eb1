"""`dft-kernels gap`: is there anything to close between a model's writing and a target, and where."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import transformers

from ..benchmarks.tables import write_csv
from ..evaluation import plots
from ..evaluation.gap import Gap, human_prefixes, native, own_text, verdict, windows
from ..materials.records import Faults
from ..materials.sources import texts_of, trained_model
from ..models.heads import check_positions
from ..targets import target_file
from .arguments import Checked, Help, Number, OutputFile, Parser, Whole
from .flags import add_cache, add_only, add_quiet, add_sampling, add_seed, add_skip_bad, add_text, sampled
from .printing import console, progress


def parser() -> Parser:
    """The options of `dft-kernels gap`."""
    made = Parser(
        prog="dft-kernels gap",
        description="Statistic by statistic, how far a model's writing lies from a target, against what human writing "
        "of the same size is off by: on its own continuations of human prompts, and after human prefixes.",
        formatter_class=Help,
    )
    add = made.add_argument
    add("model", help="a folder or name for transformers, what dft-kernels train saved, or smollm2")
    add(
        "--target",
        required=True,
        type=Checked(target_file.load),
        help="a file of dft-kernels target build, or a preset",
    )
    add_text(made, "human writing of the target's kind, not its own text: ", required=True)
    add_only(made, "is read")
    add_skip_bad(made)
    add("--count", type=Whole(4), default=64, help="passages of it")
    add("--prompt", type=Whole(1), default=32, help="tokens of each that the model is given")
    add("--length", type=Whole(2), default=128, help="tokens that it goes on for")
    add_sampling(made, Number(above=0), "of its sampling")
    add_seed(made, "of passages and draws")
    add("--base", default=None, help="of an adapter; by default what it was trained from")
    add(
        "--own",
        type=OutputFile(),
        metavar="FILE",
        help="the model's own statistics as a target, for dft-kernels target blend --gamma; it wants a large --count",
    )
    add("--csv", type=OutputFile(), default=None, metavar="FILE", help="the table as a file")
    add("--plot", type=OutputFile(".png"), default=None, metavar="FILE.png", help="its picture")
    add_cache(made)
    add_quiet(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Measure, print and write."""
    transformers.utils.logging.disable_progress_bar()
    chosen = trained_model(options.model, options.base)
    target = target_file.load(options.target)
    faults = Faults(options.skip_bad)
    texts = texts_of(options.text, options.cache, options.only, faults)
    out = console(quiet=options.quiet)
    for line in faults.said():
        out.print(line, highlight=False)
    model, tokenizer = chosen.load(options.cache)
    target_file.check_tokenizer(options.target, target, tokenizer)
    passages = windows(texts, tokenizer, options.prompt, options.length, options.count, options.seed)
    check_positions(
        model, passages.shape[1], "gap", "length", "be, with the prompt,", "Lower it: the model has no more"
    )
    with progress("reading", passages.numel(), "tokens", options.quiet) as bar:
        gaps = human_prefixes(model, target, passages, tick=lambda count: bar(count * passages.shape[1]))
    with progress("writing", options.count * options.length, "tokens", options.quiet) as bar:
        own = native(
            model, tokenizer, passages, options.prompt, seed=options.seed,
            name=options.own.stem if options.own is not None else options.model,
            source=f"{options.model}, going on from {', '.join(options.text)}; {sampled(options)}",
            temperature=options.temperature, top_p=options.top_p, tick=lambda count: bar(count * options.length),
        )  # fmt: skip
        gaps += own_text(own, tokenizer, target, passages, options.prompt)
    out.print(render(gaps, options, target.about.name))
    for line in verdict(gaps):
        out.print(line, highlight=False)
    if options.own is not None:
        target_file.save(own, options.own)
        for warning in own.warnings:
            print(f"dft-kernels gap: --own, too small for {warning}", file=sys.stderr)
    if options.csv is not None:
        shared = {name: getattr(options, name) for name in
                  ("model", "target", "temperature", "top_p", "count", "prompt", "length", "seed")}  # fmt: skip
        write_csv(options.csv, [{**vars(gap), "ratio": gap.ratio, **shared} for gap in gaps])
    if options.plot is not None:
        plots.gaps(gaps, f"{options.model} against {target.about.name}", options.plot)
    return 0


def render(gaps: list[Gap], options: argparse.Namespace, name: str) -> Any:
    """The gaps as a table."""
    from rich.table import Table

    table = Table("reading", "statistic", "model", "human floor", "model / floor", title=f"{options.model}, {name}")
    for gap in gaps:
        table.add_row(gap.reading, gap.statistic, f"{gap.value:.4g}", f"{gap.floor:.3g}", f"{gap.ratio:.2f}")
    table.caption = f"{options.count} passages, {options.prompt} + {options.length} tokens; {sampled(options)}"
    return table
