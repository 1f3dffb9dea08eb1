"""`dft-kernels sample`: what a trained model writes, beside its base."""

from __future__ import annotations

import argparse
from typing import Any

import transformers

from ..evaluation.held_out import distinct
from ..generation.sampling import continuations
from ..materials.sources import MODEL_HELP, model_of, texts_of, trained_model
from .arguments import Help, Number, Parser, Whole
from .flags import add_cache, add_sampling, add_seed, add_text
from .printing import console


def parser() -> Parser:
    """The options of `dft-kernels sample`."""
    made = Parser(
        prog="dft-kernels sample",
        description="Continue prompts with a trained model and with its base, side by side, by the same random draws.",
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
    add_sampling(made, Number(least=0), "of both models; 0: the likeliest token")
    add_seed(made, "of the draws")
    add_cache(made)
    return made


def run(options: argparse.Namespace) -> int:
    """Load, continue, and print."""
    from rich.table import Table

    transformers.utils.logging.disable_progress_bar()
    out = console()
    chosen = trained_model(options.model, options.base)
    texts = options.prompt if options.text is None else texts_of(options.text, options.cache)[: options.count]
    with out.status("models"):
        model, tokenizer = chosen.load(options.cache)
        models = {options.model: model}
        if chosen.base is not None:
            models = {chosen.base: model_of(chosen.base, options.cache, argument="base")[0], **models}
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if options.text is not None:
        prompts = [ids[: options.prompt_tokens] for ids in prompts]
    if not all(prompts):
        given = "prompt" if options.text is None else "text"
        raise ValueError(f"sample: {given} must hold a token, each of them, got an empty one. Leave it out.")
    drawn = {"temperature": options.temperature, "top_p": options.top_p}
    if options.temperature == 0:
        drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    made = {
        name: continuations(one, tokenizer, prompts, options.length, options.seed, **drawn)
        for name, one in models.items()
    }
    out.print(side_by_side(tokenizer, prompts, made))
    table = Table("distinct-n of these", *made)
    for n in (1, 2, 3):
        table.add_row(f"{n}", *(f"{distinct(ids, n):.3f}" for ids in made.values()))
    out.print(table)
    return 0


def side_by_side(tokenizer: Any, prompts: list[list[int]], made: dict[str, list[list[int]]]) -> Any:
    """Prompts, and what each model made of them, as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("prompt", *made, show_lines=True)
    for number, prompt in enumerate(prompts):
        cells = [prompt, *(ids[number] for ids in made.values())]
        table.add_row(*(escape(tokenizer.decode(ids)) for ids in cells))
    return table
