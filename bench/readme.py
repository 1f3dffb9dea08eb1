"""Writes the tables of README.md and docs/*.md from the CSVs in bench/results: python bench/readme.py [--check]

A table stands between two comments, of which the first names its source:

    <!-- table: bench/results/cpu.csv 4096,576,49152 bfloat16 -->     a shape, and dtypes, of `dft-kernels bench --csv`
    <!-- table: bench/results/demo-cpu.csv -->                        summary.csv of `dft-kernels demo`
    <!-- table: bench/results/NAME.csv KIND -->                       KIND: of summaries.KINDS, by what wrote the CSV
    <!-- table: bench/scale_tables.py NAME -->                        one of its TABLES, computed anew
    <!-- end -->
"""

from __future__ import annotations

import csv
import re
import runpy
import sys
from pathlib import Path

from markdown_tables import markdown
from summaries import KINDS

from dft_kernels.benchmarks import tables
from dft_kernels.benchmarks.problems import Shape

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?P<open><!-- table: (?P<source>[^\n]*?) -->\n)(?P<body>.*?)(?P<close><!-- end -->)", re.S)
_SUMMED = "Our dweight is summed in fp32; with so few rows a peer's 16-bit logits are smaller than that sum."
NOTES = {  # below a table: why a peer has a lower peak in the cells that are marked
    "bench/results/cpu.csv 1024,576,49152 bfloat16": _SUMMED,
    "bench/results/cpu.csv 2048,2048,32000 bfloat16": _SUMMED,
}


def pages() -> list[Path]:
    """The files that have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table(source: str) -> str:
    """What belongs between the comments."""
    name, *rest = source.split()
    path = ROOT / name
    if len(rest) > 1:
        return tables.markdown(tables.read(path), Shape.parse(rest[0]), rest[1:], NOTES.get(source, ""))
    (kind,) = rest or ["demo"]
    if path.suffix == ".py":
        return markdown(*runpy.run_path(str(path))["TABLES"][kind]())
    with path.open(newline="") as file:
        return KINDS[kind](list(csv.DictReader(file)))


def filled(text: str) -> str:
    """The text with every table made anew."""
    return BLOCK.sub(lambda block: f"{block['open']}{table(block['source'])}\n{block['close']}", text)


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check say which are not as the CSVs are."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    stale = 0
    for path in pages():
        old = path.read_text()
        new = filled(old)
        if old != new and arguments:
            relation = f"the tables of {path.relative_to(ROOT)} must be those of bench/results, got others"
            print(f"bench: {relation}. Run python bench/readme.py.")
            stale = 1
        elif old != new:
            path.write_text(new)
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
