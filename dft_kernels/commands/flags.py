"""The flags that several commands have, each with one meaning."""

from __future__ import annotations

from typing import Any

from ..materials.models import cache_folder
from ..materials.sources import TEXT_HELP, check_text
from .arguments import SEED, Checked, Number, output_folder


def add_cache(parser: Any) -> None:
    """--cache."""
    parser.add_argument(
        "--cache", type=output_folder, default=cache_folder(), metavar="DIR",
        help="where models and texts of pip and apt are kept",
    )  # fmt: skip


def add_text(parser: Any, about: str = "", flag: str = "--text", **more: Any) -> None:
    """--text, or another flag for texts, with words before its help."""
    parser.add_argument(flag, nargs="+", type=Checked(check_text), help=f"{about}{TEXT_HELP}", **more)


def add_only(parser: Any, about: str) -> None:
    """--assistant-only or --completion-only; about: what is left of the others."""
    whose = parser.add_mutually_exclusive_group()
    for name, of in (
        ("assistant", "conversations, the assistant's part"),
        ("completion", "prompts and completions, these"),
    ):
        whose.add_argument(
            f"--{name}-only", dest="only", action="store_const", const=name, help=f"of {of} alone {about}"
        )


def add_skip_bad(parser: Any) -> None:
    """--skip-bad."""
    parser.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read, and count them")


def add_quiet(parser: Any) -> None:
    """--quiet."""
    parser.add_argument("--quiet", action="store_true", help="print nothing but what goes wrong")


def add_seed(parser: Any, about: str) -> None:
    """--seed, of what `about` says."""
    parser.add_argument("--seed", type=SEED, default=0, help=about)


def add_sampling(parser: Any, temperature: Number, about: str, min_p: bool = False) -> None:
    """--temperature, --top-p and, where asked for, --min-p."""
    parser.add_argument("--temperature", type=temperature, default=1.0, help=about)
    parser.add_argument(
        "--top-p", type=Number(above=0, most=1), default=1.0, help="sample from the likeliest tokens of this mass"
    )
    if min_p:
        parser.add_argument(
            "--min-p", type=Number(least=0, most=1), default=0.0,
            help="leave out tokens below this share of the likeliest one's probability",
        )  # fmt: skip


def sampled(options: Any) -> str:
    """How text was drawn, for a reader."""
    min_p = f", min-p {options.min_p:g}" if hasattr(options, "min_p") else ""
    return f"temperature {options.temperature:g}, top-p {options.top_p:g}{min_p}, seed {options.seed}"
