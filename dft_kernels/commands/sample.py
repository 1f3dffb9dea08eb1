"""`dft-kernels sample`: what a trained model writes, beside its base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import transformers

from ..evaluation.held_out import distinct
from ..generation.sampling import continuations
from ..materials.models import cache_folder
from ..materials.sources import MODEL_HELP, TEXT_HELP, model_of, texts_of, trained_model_of


def parser() -> argparse.ArgumentParser:
    """The options of `dft-kernels sample`."""
    made = argparse.ArgumentParser(
        prog="dft-kernels sample",
        description="Continue prompts with a trained model and with its base, side by side, by the same random draws.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("model", help="what dft-kernels train saved: a model, an adapter of PEFT, or a correction; or any model")
    add("--base", default=None, help=f"{MODEL_HELP}; by default what it was trained from")
    add("--prompt", nargs="+", default=None, help="texts to continue")
    add("--text", nargs="+", default=None, help=f"instead, the beginnings of some of its passages: {TEXT_HELP}")
    add("--count", type=int, default=4, help="prompts taken of --text")
    add("--prompt-tokens", type=int, default=24, help="tokens of such a prompt")
    add("--length", type=int, default=48, help="new tokens")
    add("--temperature", type=float, default=1.0, help="of both models; 0: the likeliest token")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--seed", type=int, default=0, help="of the draws")
    add("--cache", type=Path, default=cache_folder(), metavar="DIR", help="where models and texts of pip are kept")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"dft-kernels {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    if (options.prompt is None) == (options.text is None):
        raise ValueError("sample: --prompt or --text must be given, one of the two, got none or both. Name a prompt.")
    for name in ("count", "prompt_tokens", "length"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"sample: --{name.replace('_', '-')} must be positive, got {getattr(options, name)}. Raise it."
            )
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        got = f"{options.temperature}, {options.top_p}"
        raise ValueError(f"sample: --temperature must be at least 0 and --top-p in (0, 1], got {got}. Change them.")
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    with console.status("models"):
        model, tokenizer, base = trained_model_of(options.model, options.base, options.cache)
        models = {options.model: model}
        if base is not None:
            models = {base: model_of(base, options.cache)[0], **models}
    texts = options.prompt if options.text is None else texts_of(options.text, options.cache)[: options.count]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if options.text is not None:
        prompts = [ids[: options.prompt_tokens] for ids in prompts]
    if not all(prompts):
        raise ValueError("sample: every prompt must hold a token, got an empty one. Leave it out.")
    drawn = {"temperature": options.temperature, "top_p": options.top_p}
    if options.temperature == 0:
        drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    made = {
        name: continuations(one, tokenizer, prompts, options.length, options.seed, **drawn)
        for name, one in models.items()
    }
    console.print(side_by_side(tokenizer, prompts, made))
    table = Table("distinct-n of these", *made)
    for n in (1, 2, 3):
        table.add_row(f"{n}", *(f"{distinct(ids, n):.3f}" for ids in made.values()))
    console.print(table)
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
