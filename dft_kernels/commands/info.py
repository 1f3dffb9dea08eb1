"""`dft-kernels info`: the environment report."""

from __future__ import annotations

import argparse
import json

from ..info import check, collect, render
from .arguments import Parser


def parser() -> Parser:
    """The options of `dft-kernels info`."""
    made = Parser(prog="dft-kernels info", description="Versions, backends, build, defaults.")
    shown = made.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument(
        "--check", action="store_true", help="compute losses and gradients by each backend and compare with float64"
    )
    return made


def run(options: argparse.Namespace) -> int:
    """Print the report, or check each backend: exit code 1 where one is wrong."""
    if options.check:
        return _check()
    report = collect()
    print(json.dumps(report, indent=1) if options.json else render(report))
    return 0


def _check() -> int:
    wrong, ran = 0, set()
    for one in check():
        print(one, flush=True)
        wrong += not one.passed
        ran |= {one.backend} if one.unavailable is None else set()
    print(f"{'WRONG' if wrong else 'right'}: {', '.join(sorted(ran))}" + (f"; {wrong} failed" if wrong else ""))
    return int(wrong > 0)
