"""`dft-kernels report`: what evaluations found, as one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation import results
from ..evaluation.report import page
from ..files import replace_text
from .arguments import OutputFile, Parser


def parser() -> Parser:
    """The options of `dft-kernels report`."""
    made = Parser(
        prog="dft-kernels report",
        description="One HTML file, which needs nothing beside it, of what dft-kernels evaluate found: is there a gap "
        "between a model's writing and people's, was it closed, what did it cost.",
    )
    made.add_argument(
        "run",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders that dft-kernels evaluate wrote; the first model of the first is where the others started",
    )
    made.add_argument("--out", type=OutputFile(".html"), required=True, metavar="FILE.html", help="the page")
    return made


def run(options: argparse.Namespace) -> int:
    """Read, draw and write."""
    runs = [results.load(path) for path in options.run]
    text = page(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, text)
    models = sum(len(one.models) for one in runs)
    print(f"{options.out}: {models} {'model' if models == 1 else 'models'}, {len(text.encode()) / 1e6:.2f} MB")
    return 0
