"""Writes the README's tables from the CSVs in bench/results: python bench/readme.py [--check]

A table stands between two comments. The first says where it comes from: a file of `dft-kernels bench --csv`, a shape
and a dtype; a summary.csv of `dft-kernels demo`; with "stores" after it, a file of bench/teachers.py; with "longest",
one of bench/longest.py; with "terms", of bench/terms.py; with "target", of bench/targets.py.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

from dft_kernels.benchmarks import tables
from dft_kernels.benchmarks.problems import Shape

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?P<open><!-- table: (?P<source>[^\n]*?) -->\n)(?P<body>.*?)(?P<close><!-- end -->)", re.S)


def demo_table(path: Path) -> str:
    """Of the demo's summary: a column a model."""
    with path.open(newline="") as file:
        models = list(csv.DictReader(file))
    first, ways = models[0], [model for model in models if model["step_s"]]
    rows: dict[str, Callable[[dict[str, str]], str]] = {
        "KL(teacher ‖ model), nats": lambda m: f"{float(m['kl']):.3f}",
        "perplexity": lambda m: f"{float(m['perplexity']):,.1f}",
        "entropy, nats": lambda m: f"{float(m['entropy']):.2f}",
        "next token right": lambda m: f"{100 * float(m['accuracy']):.1f} %",
        "distinct-1, -2 of continuations": lambda m: (
            f"{float(m['distinct_1']):.2f}, {float(m['distinct_2']):.2f}" if m["distinct_1"] else ""
        ),
        "s a step": lambda m: f"{float(m['step_s']):.2f}" if m["step_s"] else "",
    }
    lines = [
        [f"{first['steps']} steps of {first['tokens']} tokens, fp32", *(model["model"] for model in models)],
        ["---"] * (len(models) + 1),
        *([name, *map(value, models)] for name, value in rows.items()),
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    where = f"{first['machine']}; torch {first['torch']}; commit {first['commit']}"
    assert len(ways) == 2
    return f"{table}\n\n{where}; captured at {float(first['capture_tokens_s']):,.0f} tokens/s."


def stores_table(path: Path) -> str:
    """Of bench/teachers.py: a row a teacher."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {
        "bytes a token": lambda r: f"{float(r['bytes_a_token']):.0f}",
        "captured, tokens/s": lambda r: f"{float(r['capture_tokens_s']):.0f}",
        "read, MB/s": lambda r: f"{float(r['read_mb_s']):.0f}",
        "loss, x CE": lambda r: f"{float(r['over_ce']):.2f}",
        "training step over CE's": lambda r: f"{100 * float(r['step_over_ce']) - 100:+.1f} %",
        "teacher's mass outside": lambda r: f"{100 * float(r['tail']):.1f} %",
        "loss seen, of the exact KL": lambda r: f"{100 * float(r['kl_seen']):.2f} %",
        "error of the gradient": lambda r: f"{100 * float(r['gradient_error']):.2f} %",
        "curve apart": lambda r: f"{float(r['apart']):.1e}",
        "held-out KL": lambda r: f"{float(r['held_out_kl']):.4f}",
    }

    def cell(row: dict[str, str], show: Callable[[dict[str, str]], str]) -> str:
        try:
            return show(row)
        except ValueError:  # an empty cell: it was not measured for this teacher
            return ""

    lines = [["teacher", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row["teacher"], *(cell(row, show) for show in columns.values())] for row in rows]
    first = rows[0]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{first['machine']}; torch {first['torch']}; commit {first['commit']}; {first['steps']} steps."


def longest_table(path: Path) -> str:
    """Of bench/longest.py: a row a way."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    budget = f"{int(first['budget_bytes']) / (1 << 30):g} GiB"
    lines = [["Gemma3-270M, batch 1", f"longest sequence within {budget}", "peak at 1024 tokens"], ["---"] * 3]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        longest = next((f"{row['length']} tokens" for row in mine if row["longest"] == "1"), "none")
        peak = next(row["peak_bytes"] for row in mine if row["length"] == "1024")
        lines.append([way, longest, f"{int(peak) / (1 << 30):.2f} GiB" if peak else "not measured"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{first['machine']}; torch {first['torch']}; commit {first['commit']}."


def terms_table(path: Path) -> str:
    """Of bench/terms.py: a row a term, a column a shape."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shapes = list(dict.fromkeys((row["n"], row["h"]) for row in rows))
    names = list(dict.fromkeys(row["terms"] for row in rows))
    over = {(row["terms"], (row["n"], row["h"])): f"{100 * float(row['over_ce']) - 100:+.1f} %" for row in rows}
    first = rows[0]
    base = {(row["n"], row["h"]): f"{float(row['ms']):,.0f} ms" for row in rows if row["terms"] == names[0]}
    lines = [["beside cross-entropy, delayed", *(f"N {n}, H {h}" for n, h in shapes)], ["---"] * (len(shapes) + 1)]
    lines += [[f"{names[0]} alone", *(base[shape] for shape in shapes)]]
    lines += [[name, *(over[name, shape] for shape in shapes)] for name in names[1:]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = f"{first['machine']}; torch {first['torch']}; commit {commits}"
    return f"{table}\n\nV {first['v']}, bfloat16; {where}; medians of {first['rounds']} interleaved rounds."


def target_table(path: Path) -> str:
    """Of bench/targets.py: a row a statistic, a column a model, in units of the floor."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys(row["model"] for row in rows))
    of = {name: next(row for row in rows if row["model"] == name) for name in models}
    lines = [["distance to the target, in floors", "the floor", *models], ["---"] * (len(models) + 2)]
    for reading, statistic in dict.fromkeys((row["reading"], row["statistic"]) for row in rows):
        mine = {row["model"]: row for row in rows if (row["reading"], row["statistic"]) == (reading, statistic)}
        floor = f"{float(next(iter(mine.values()))['floor']):.3g}"
        cells = [f"{float(mine[name]['ratio']):.2f}" if name in mine else "" for name in models]
        lines.append([f"{reading}: {statistic}", floor, *cells])
    numbers = {"held-out cross-entropy, nats": ("cross_entropy", 3), "entropy there, nats": ("entropy", 3),
               "cosine of the gradients of two halves": ("cosine", 2)}  # fmt: skip
    for title, (name, digits) in numbers.items():
        values = [float(of[model][name]) for model in models]
        lines.append([title, "", *("" if value != value else f"{value:.{digits}f}" for value in values)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    first = rows[0]
    size = f"{first['steps']} steps of {first['tokens']} tokens of {first['text']}"
    size += f"; {first['count']} passages of {first['length']} tokens"
    return f"{table}\n\n{size}; {first['machine']}; torch {first['torch']}; commit {first['commit']}."


def table(source: str) -> str:
    """What belongs between the comments."""
    name, *rest = source.split()
    path = ROOT / name
    if not rest:
        return demo_table(path)
    if rest == ["stores"]:
        return stores_table(path)
    if rest == ["longest"]:
        return longest_table(path)
    if rest == ["terms"]:
        return terms_table(path)
    if rest == ["target"]:
        return target_table(path)
    shape, dtype = rest
    return tables.markdown(tables.read(path), Shape.parse(shape), dtype)


def filled(text: str) -> str:
    """The text with every table made anew."""
    return BLOCK.sub(lambda block: f"{block['open']}{table(block['source'])}\n{block['close']}", text)


def main(arguments: list[str]) -> int:
    """Write the README, or with --check say whether it is as the CSVs are."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if arguments == ["--check"]:
        if old != new:
            print("bench: the tables of README.md must be those of bench/results. Run python bench/readme.py.")
        return int(old != new)
    if arguments:
        print(__doc__)
        return 2
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
