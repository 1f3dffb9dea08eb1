"""`dft-kernels sample`: what a model writes, beside its base or beside itself with other settings."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import fail
from ..evaluation.held_out import distinct
from ..files import regular, replace_text
from ..generation.refiner import IterativeRefiner
from ..generation.sampling import Sampling, continuations, ends_of, text_after
from ..generation.settings import Record, Settings, recorded
from ..generation.stream import Drawn, Stream, check_prompts
from ..materials.sources import MODEL_HELP, config_of, model_of, texts_of, tokenizer_of, trained_model
from .arguments import Help, Number, OutputFile, Parser, Whole
from .flags import add_cache, add_sampling, add_seed, add_steps, add_text, settings_of
from .printing import console, growing, show


@dataclass
class Column:
    """A model and how it is drawn from. label: what tells it from the others; name: the model's; steps: of settings;
    written: new tokens after each prompt; drawn: all of them, with their ends, of no beams."""

    label: str
    name: str
    model: Any
    settings: Settings
    steps: list[LogitsProcessor]
    written: list[list[int]] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)


def parser() -> Parser:
    """The options of `dft-kernels sample`."""
    made = Parser(
        prog="dft-kernels sample",
        description="Continue prompts with a model and with its base, or with itself at other settings, side by side, "
        "by the same random draws.",
        formatter_class=Help,
    )
    add = made.add_argument
    add("model", help="what dft-kernels train saved: a model, an adapter of PEFT, or a correction; or any model")
    add("--base", default=None, help=f"{MODEL_HELP}; by default what it was trained from")
    of = made.add_mutually_exclusive_group(required=True)
    of.add_argument("--prompt", nargs="+", default=None, help="texts to continue")
    add_text(of, "instead, the beginnings of some of its passages: ")
    add("--count", type=Whole(1), default=4, help="prompts taken of --text")
    add("--prompt-tokens", type=Whole(1), default=24, help="tokens of such a prompt")
    add("--length", type=Whole(1), default=48, help="new tokens")
    add("--compare", action="store_true", help="the model as it is beside it with these settings, in place of its base")
    add_sampling(made, Number(least=0), "of all models; 0: the likeliest token", min_p=True)
    add_steps(made)
    add("--beams", type=Whole(1), default=1, help="of a beam search, which draws nothing; 1: none")
    add_seed(made, "of the draws: prompt number i, from 0, has the draws of SEED + i")
    add("--out", type=OutputFile(".jsonl"), default=None, metavar="FILE.jsonl", help="a line a text, as it is finished")
    add_cache(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Load, continue, and print."""
    transformers.utils.logging.disable_progress_bar()
    out, settings = console(), settings_of(options)
    if options.compare and settings == settings.plain:
        fail("sample", "compare", "stand beside a setting", "none", "Add one, as --diversity 0.1")
    if options.out is not None:
        _check_out(options.out)
    chosen = trained_model(options.model, options.base)
    texts = options.prompt if options.text is None else texts_of(options.text, options.cache)[: options.count]
    tokenizer = tokenizer_of(chosen.whole, options.cache)
    settings.steps(tokenizer)  # their mistakes, before a model is read
    if options.text is not None:
        beginnings = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        texts = [text_after(tokenizer, [], ids[: options.prompt_tokens]) for ids in beginnings]
    prompts = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    if not all(prompts):
        given = "prompt" if options.text is None else "text"
        raise ValueError(f"sample: {given} must hold a token, each of them, got an empty one. Leave it out.")
    beside = None if options.compare else chosen.base
    for name in (chosen.whole, *([] if beside is None else [beside])):
        check_prompts(config_of(name, options.cache), prompts, options.length)
    with out.status("models"):
        model, _ = chosen.load(options.cache)
        made = {options.model: (options.model, model, settings)}
        if options.compare:
            made = {
                f"{options.model}, as it is": (options.model, model, settings.plain),
                f"{options.model}, with these settings": (options.model, model, settings),
            }
        elif beside is not None:
            made = {beside: (beside, model_of(beside, options.cache, argument="base")[0], settings), **made}
    columns = [
        Column(label, name, of, how, how.steps(tokenizer, ends_of(of, tokenizer)))
        for label, (name, of, how) in made.items()
    ]
    records: list[Record] = []
    for number, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        seed = options.seed + number
        if settings.beams > 1:
            with out.status("beams"):
                found = [_searched(column, tokenizer, text, ids, options.length, seed) for column in columns]
            show(out, text, [(column.label, one.text) for column, one in zip(columns, found, strict=True)])
        else:
            found = _drawn(columns, tokenizer, text, ids, options.length, seed, out)
        records += found
        if options.out is not None:
            lines = [json.dumps(asdict(one), ensure_ascii=False, allow_nan=False) for one in records]
            replace_text(options.out, "".join(f"{line}\n" for line in lines))
    out.print(_summary(columns))
    for column in columns:
        for refiner in (step for step in column.steps if isinstance(step, IterativeRefiner)):
            _refined(out, column, refiner)
    return 0


def _drawn(
    columns: list[Column], tokenizer: Any, prompt: str, ids: list[int], length: int, seed: int, out: Any
) -> list[Record]:
    """Draw a text of each column, a token of each in turn, shown meanwhile."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(
                Stream(one.model, tokenizer, [ids], length, seed, one.steps, greedy=one.settings.greedy)
            )
            for one in columns
        ]
        pairs = list(zip(columns, streams, strict=True))
        with growing(out, prompt, lambda: [(column.label, stream.texts()[0]) for column, stream in pairs]):
            for _ in zip_longest(*streams):
                pass
    for column, stream in pairs:
        column.written += stream.written()
        column.drawn += stream.drawn[0]
    return [recorded(column.name, prompt, column.settings, stream) for column, stream in pairs]


def _searched(column: Column, tokenizer: Any, prompt: str, ids: list[int], length: int, seed: int) -> Record:
    """The likeliest text that beams find."""
    (new,) = continuations(
        column.model, tokenizer, [ids], length, num_beams=column.settings.beams,
        logits_processor=LogitsProcessorList(column.steps), **Sampling(temperature=0).keywords(),
    )  # fmt: skip
    column.written.append(new)
    text = text_after(tokenizer, ids, new)
    return Record(column.name, prompt, text, len(new), None, None, length, seed, asdict(column.settings))


def _check_out(path: Path) -> None:
    """ValueError for a file that another program wrote."""
    if not path.exists():
        return
    try:
        regular(path)
        with path.open("rb") as file:
            first = file.readline(1 << 20)
        ours = not first or [*json.loads(first)] == [one.name for one in fields(Record)]
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        fail("sample", "out", "be a new file, or one that this command wrote", path, "Name another")


def _summary(columns: list[Column]) -> Any:
    """What the texts of each column are together."""
    from rich.table import Table
    from rich.text import Text

    table = Table("of all texts")
    for one in columns:
        table.add_column(Text(one.label))
    table.add_row("tokens", *(str(sum(map(len, one.written))) for one in columns))
    for n in (1, 2, 3):
        table.add_row(f"distinct-{n}", *(f"{distinct(one.written, n):.3f}" for one in columns))
    shaped = any(one.settings != one.settings.plain for one in columns)  # else each draws from its model as it is
    for name, about in (("entropy", "entropy, nats a token"), ("kl", "KL from the model, nats a token")):
        if all(one.drawn for one in columns) and (shaped or name != "kl"):
            means = (sum(getattr(token, name) for token in one.drawn) / len(one.drawn) for one in columns)
            table.add_row(about, *(f"{mean:.4f}" for mean in means))
    return table


def _refined(out: Any, column: Column, refiner: IterativeRefiner) -> None:
    """Print what a refiner spent, and for what."""
    from rich.table import Table

    found, name = refiner.report(), refiner.target.about.name
    tokens = f"{found.tokens} tokens{' of all beams' if column.settings.beams > 1 else ''}"
    spent = f"KL {found.kl:.4f} nats a token, {found.bounded:.0%} of {tokens} at the bound of {refiner.bound:g}"
    out.print(f"{column.label}, refined towards {name}: {spent}", markup=False, highlight=False)
    if refiner.native is None:
        hint = "by the text so far alone, which moves little: measure the model's own with dft-kernels gap --own, "
        out.print(f"{hint}and name the file with --native", markup=False, highlight=False)
    table = Table("expected in 1,000 tokens", "before", "after", "target")
    for statistic, target in found.target.items():
        values = (found.before[statistic], found.after[statistic], target)
        table.add_row(statistic, *(f"{1000 * value:.1f}" for value in values))
    out.print(table)
