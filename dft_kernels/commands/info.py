"""`dft-kernels info`: the environment report."""

from __future__ import annotations

import argparse
import json

from ..info import collect, render
from .arguments import Parser


def parser() -> Parser:
    """The options of `dft-kernels info`."""
    made = Parser(prog="dft-kernels info", description="Versions, backends, build, defaults.")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    print(json.dumps(report, indent=1) if options.json else render(report))
    return 0
