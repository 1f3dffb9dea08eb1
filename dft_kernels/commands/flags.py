"""The flags that several commands have, each with one meaning."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..materials.models import cache_folder
from ..materials.sources import TEXT_HELP, check_text
from ..targets import target_file
from .arguments import SEED, Checked, Number, output_folder

if TYPE_CHECKING:
    from ..generation.settings import Settings


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


def add_steps(parser: Any) -> None:
    """What else `generation.settings.Settings` has, but beams."""
    from ..generation.refiner import STATISTICS, TOWARDS

    add, target = parser.add_argument, Checked(target_file.load)
    add(
        "--top-n-sigma",
        type=Number(above=0),
        default=None,
        metavar="N",
        help="leave out tokens whose score lies N standard deviations below the likeliest one's",
    )
    add(
        "--diversity",
        type=Number(above=-1),
        default=0.0,
        metavar="D",
        help="draw each token at the temperature at which its entropy is 1 + D times the model's",
    )
    add(
        "--entropy-temperature",
        type=Number(least=0),
        default=0.0,
        metavar="THETA",
        help="draw each token at the temperature 0.8^(THETA / entropy): the surer the model, the colder",
    )
    add(
        "--style",
        type=style,
        default=None,
        metavar="NAME=GAMMA",
        help="shift token frequencies towards a target, a file of dft-kernels target build or a preset: GAMMA 0 is the "
        "model as it is, 1 the target's",
    )
    add("--style-base", type=target, default="reference", metavar="TARGET", help="what --style leads away from")
    add(
        "--refine",
        type=target,
        default=None,
        metavar="TARGET",
        help="draw each token so that sentence lengths and punctuation of the text so far come closer to a target's",
    )
    add(
        "--bound",
        type=Number(least=0),
        default=0.1,
        metavar="NATS",
        help="how far from the model --refine may go, KL a token",
    )
    add("--native", type=target, default=None, metavar="FILE",
        help="how the model writes as it is, of dft-kernels gap --own: what --refine leads away from")  # fmt: skip
    add("--towards", nargs="+", choices=STATISTICS, default=TOWARDS, metavar="STATISTIC",
        help=f"what --refine moves: {', '.join(STATISTICS)}, of which the last needs --native")  # fmt: skip


def style(text: str) -> tuple[str, float]:
    """A target's name and a factor."""
    name, _, gamma = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"must be NAME=GAMMA, got {text!r}. Write one, such as literary=0.5.")
    return Checked(target_file.load)(name), Number()(gamma)


def settings_of(options: Any) -> Settings:
    """What these flags, those of `add_sampling` and --beams say, as many as there are; ValueError for what does not go
    together."""
    from ..generation.settings import Settings

    names = [field.name for field in fields(Settings)]
    return Settings(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def sampled(options: Any) -> str:
    """How text was drawn, for a reader."""
    min_p = f", min-p {options.min_p:g}" if hasattr(options, "min_p") else ""
    return f"temperature {options.temperature:g}, top-p {options.top_p:g}{min_p}, seed {options.seed}"
