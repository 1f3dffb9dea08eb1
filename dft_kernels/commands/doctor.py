"""`dft-kernels doctor`: what is wrong with this installation, and what mends it."""

from __future__ import annotations

import argparse
from collections import Counter

from ..doctor import examine
from .arguments import Parser


def parser() -> Parser:
    """The options of `dft-kernels doctor`."""
    return Parser(
        prog="dft-kernels doctor",
        description="Looks at Python, torch, compiled kernels, GPUs, packages and folders. A note breaks nothing; for "
        "each fault (exit code 1) and note there is a line that mends it.",
    )


def run(options: argparse.Namespace) -> int:
    """Print the findings."""
    states: Counter[str] = Counter()
    for finding in examine():
        states[finding.state] += 1
        print(f"{finding.state:6} {finding.said}", flush=True)
        if finding.mend is not None:
            print(f"       > {finding.mend}", flush=True)
    faults, notes = states["fault"], states["note"]
    count = f"{faults} fault{'s' * (faults != 1)}, {notes} note{'s' * (notes != 1)}"
    print(f"{count}. dft-kernels info --check computes with every backend.")
    return int(faults > 0)
