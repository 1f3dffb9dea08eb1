"""How far people's own text lies from a target in the floors of `dft-kernels play`: python bench/play.py [--csv FILE]

Of the novels behind the preset `literary`, passages dealt into two halves: a target of one, and texts of the other, of
several lengths, measured as a page measures what a model writes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.materials.models import cache_folder
from dft_kernels.materials.sources import tokenizer_of
from dft_kernels.materials.texts import documents_of
from dft_kernels.play.distances import ROWS, Ruler
from dft_kernels.store.fingerprint import tokenizer_fingerprint
from dft_kernels.targets import corpus

LENGTHS, PROMPT = (64, 128, 256, 512), 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    options = parser.parse_args()
    tokenizer = tokenizer_of("smollm2", options.cache)
    pool = [
        one for text in documents_of("literary", options.cache)[1] for one in corpus.passages(text.splitlines(True))
    ]
    random.Random(0).shuffle(pool)
    target = corpus.build(pool[: len(pool) // 2], tokenizer, name="half of the novels")
    ruler = Ruler(target, tokenizer_fingerprint(tokenizer))
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pool[len(pool) // 2 :]]
    texts = [ids for ids in texts if len(ids) >= PROMPT + max(LENGTHS)][: options.texts]
    found: dict[tuple[str, int], list[float]] = {(row.label, length): [] for row in ROWS for length in LENGTHS}
    for ids in texts:
        for length in LENGTHS:
            new = ids[PROMPT : PROMPT + length]
            for one in ruler(tokenizer.decode(ids[:PROMPT]), tokenizer.decode(new), new):
                if one.ratio is not None:
                    found[one.label, length].append(one.ratio)

    def cell(ratios: list[float]) -> str:
        if len(ratios) < len(texts) / 4:
            return f"in {len(ratios)} of {len(texts)} texts"
        return f"{np.mean(ratios):.2f} ({np.quantile(ratios, 0.95):.1f})"

    run = about("cpu")
    caption = (
        f"{len(texts)} texts of the novels behind `literary`, target of the other half ({target.about.tokens:,} "
        f"tokens); commit {run['commit']}; {run['date']}"
    )
    rows = [
        {"people's own text, in floors: mean (95 % quantile)": row.label,
         **{f"{length} tokens": cell(found[row.label, length]) for length in LENGTHS}, "about": caption}
        for row in ROWS
    ]  # fmt: skip
    for line in rows:
        print(*line.values(), sep=" | ")
    if options.csv is not None:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
