"""`dft-kernels gap`: is there anything to close between a model's writing and a target, and where."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from ..evaluation.gap import CLOSED, FORCED, OWN, Gap, human_prefixes, native, own_text, windows
from ..materials.models import cache_folder
from ..materials.sources import TEXT_HELP, texts_of, trained_model_of


def parser() -> argparse.ArgumentParser:
    """The options of `dft-kernels gap`."""
    made = argparse.ArgumentParser(
        prog="dft-kernels gap",
        description="Statistic by statistic, how far a model's writing lies from a target, against what human writing "
        "of the same size is off by: on its own continuations of human prompts, and after human prefixes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("model", help="a folder or name for transformers, what dft-kernels train saved, or smollm2")
    add("--target", required=True, help="a file of dft-kernels target build, or a preset")
    add("--text", required=True, nargs="+", help=f"human writing of the target's kind, not its own text: {TEXT_HELP}")
    add("--count", type=int, default=64, help="passages of it")
    add("--prompt", type=int, default=32, help="tokens of each that the model is given")
    add("--length", type=int, default=128, help="tokens that it goes on for")
    add("--temperature", type=float, default=1.0, help="of its sampling")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--seed", type=int, default=0, help="of passages and draws")
    add("--base", default=None, help="of an adapter; by default what it was trained from")
    add(
        "--own",
        type=Path,
        metavar="FILE",
        help="the model's own statistics as a target, for dft-kernels target blend --gamma; it wants a large --count",
    )
    add("--csv", type=Path, default=None, metavar="FILE", help="the table as a file")
    add("--plot", type=Path, default=None, metavar="FILE.png", help="its picture")
    add("--cache", type=Path, default=cache_folder(), metavar="DIR", help="where models and texts of pip are kept")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"dft-kernels {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dft-kernels gap: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    import transformers
    from rich.console import Console

    from ..targets import target_file

    transformers.utils.logging.disable_progress_bar()

    for name, least in (("count", 4), ("prompt", 1), ("length", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"gap: --{name} must be at least {least}, got {getattr(options, name)}. Raise it.")
    if not options.temperature > 0 or not 0 < options.top_p <= 1:
        got = f"{options.temperature}, {options.top_p}"
        raise ValueError(f"gap: --temperature must be above 0 and --top-p in (0, 1], got {got}. Change them.")
    for file in (options.csv, options.plot):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    target = target_file.load(options.target)
    texts = texts_of(options.text, options.cache)
    console = Console(width=None if sys.stdout.isatty() else 120)
    model, tokenizer, _ = trained_model_of(options.model, options.base, options.cache)
    target_file.check_tokenizer(options.target, target, tokenizer)
    passages = windows(texts, tokenizer, options.prompt, options.length, options.count, options.seed)
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    with console.status(f"reading {passages.numel():,} tokens, writing {options.count * options.length:,}"):
        gaps = human_prefixes(model, target, passages)
        name = options.own.stem if options.own is not None else options.model
        source = f"{options.model}, going on from {', '.join(options.text)}; {_sampled(options)}"
        own = native(
            model, tokenizer, passages, options.prompt, seed=options.seed, name=name, source=source, **sampling
        )
        gaps += own_text(own, tokenizer, target, passages, options.prompt)
    console.print(render(gaps, options, target.about.name))
    for line in verdict(gaps):
        console.print(line, highlight=False)
    if options.own is not None:
        target_file.save(own, options.own)
        for warning in own.warnings:
            print(f"dft-kernels gap: --own, too small for {warning}", file=sys.stderr)
    if options.csv is not None:
        _write(gaps, options)
    if options.plot is not None:
        plot(gaps, f"{options.model} against {target.about.name}", options.plot)


def render(gaps: list[Gap], options: argparse.Namespace, name: str) -> Any:
    """The gaps as a table."""
    from rich.table import Table

    table = Table("reading", "statistic", "model", "human floor", "model / floor", title=f"{options.model}, {name}")
    for gap in gaps:
        table.add_row(gap.reading, gap.statistic, f"{gap.value:.4g}", f"{gap.floor:.3g}", f"{gap.ratio:.2f}")
    table.caption = f"{options.count} passages, {options.prompt} + {options.length} tokens; {_sampled(options)}"
    return table


def _sampled(options: argparse.Namespace) -> str:
    return f"temperature {options.temperature:g}, top-p {options.top_p:g}, seed {options.seed}"


def verdict(gaps: list[Gap]) -> list[str]:
    """What there is to close, and what not, in words."""
    lines = []
    for reading in (FORCED, OWN):
        some = [gap for gap in gaps if gap.reading == reading]
        wide = sorted((gap for gap in some if gap.ratio > CLOSED), key=lambda gap: -gap.ratio)
        if not wide:
            lines.append(f"{reading}: nothing to close: no statistic is {CLOSED:g} times its floor.")
            continue
        named = ", ".join(f"{gap.statistic} ({gap.ratio:.1f})" for gap in wide)
        lines.append(f"{reading}: {len(wide)} of {len(some)} above {CLOSED:g} times their floor: {named}.")
    return lines


def _write(gaps: list[Gap], options: argparse.Namespace) -> None:
    shared = {"model": options.model, "target": options.target, "temperature": options.temperature,
              "top_p": options.top_p, "count": options.count, "prompt": options.prompt, "length": options.length,
              "seed": options.seed}  # fmt: skip
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*vars(gaps[0]), "ratio", *shared], lineterminator="\n")
        table.writeheader()
        table.writerows({**vars(gap), "ratio": gap.ratio, **shared} for gap in gaps)


def plot(gaps: list[Gap], title: str, file: Path) -> None:
    """Every statistic's distance in units of its floor, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [gap for gap in gaps if 0 < gap.ratio < float("inf")]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(shown)))
    colours = {FORCED: "tab:gray", OWN: "tab:blue"}
    names = [f"{gap.statistic} ({gap.reading})" for gap in shown]
    axes.barh(names, [gap.ratio for gap in shown], color=[colours[gap.reading] for gap in shown])
    axes.axvline(1.0, color="black", linestyle=":", label="human against human")
    axes.set(xscale="log", xlabel="distance / what human writing of this size is off by", title=title)
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
