"""Whether the floors of an evaluation hold: python bench/evaluation.py --human FILES [--csv FILE] [--draws 50] ...

People against people: passages of human texts are dealt anew, draw after draw, into a reference, a control and a third
side that stands for a model's. Of each metric, the share of draws in which the third side is within its floor, which
should be 95 %, and of those in which the interval holds 0 (of differences, for which that is meant to be 95 % too).
What a model expects where it reads (SmolLM2 here, with people in its own texts' place) is not 0 for people: of these
metrics it is whether a value lies within the floor of that of all passages together, and the interval holds that.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.evaluation.documents import Documents
from dft_kernels.evaluation.measure import measured, style_score
from dft_kernels.evaluation.metrics import METRICS, Expectation, Sample
from dft_kernels.evaluation.people import people
from dft_kernels.evaluation.reading import Read, Reading, read
from dft_kernels.materials.encoders import embed, encoder
from dft_kernels.materials.models import cache_folder, smollm2
from dft_kernels.materials.sources import texts_of, tokenizer_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--human", nargs="+", required=True)
    parser.add_argument("--name", required=True, help="of these texts, in the table")
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--halves", type=int, default=100)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    options = parser.parse_args()
    tokenizer, count = tokenizer_of(options.tokenizer, options.cache), options.count
    pool = people(texts_of(options.human, options.cache), tokenizer, 32, options.length, 6 * count).all
    texts, prompts = (np.array([getattr(one, part) for one in pool], object) for part in ("text", "prompt"))
    vectors = embed(encoder("minilm", options.cache), list(texts)).double().numpy()
    metrics = [replace(one, halves=options.halves) for one in METRICS]
    model, its = smollm2(options.cache)
    whole, every = read(model.float().eval(), its, list(prompts), list(texts)), np.arange(len(texts))
    true = {one.name: one.of(whole, every, whole, every)[0] for one in metrics if isinstance(one, Expectation)}
    within: dict[str, list[bool]] = {metric.name: [] for metric in metrics}
    holds, scores, seconds = {metric.name: [] for metric in metrics}, [], []
    for draw in range(options.draws):
        order = np.random.default_rng(draw).permutation(len(texts))[: 3 * count]
        of, human = list(texts[order]), np.arange(2 * count)
        documents = Documents(of, human, tokenizer, vectors[order], list(prompts[order]))
        parts = (Read(*(sums[at] for sums in vars(whole).values())) for at in (order[human], order[2 * count :]))
        sample = Sample(documents, np.arange(2 * count, 3 * count), Reading(*parts))
        began = time.perf_counter()
        found = measured({"people": sample}, metrics=metrics, seed=draw)
        seconds.append(time.perf_counter() - began)
        for one in found["people"]:
            value = one.value
            if value.value is not None and value.floor:
                at = true.get(one.metric.name, 0.0)
                within[one.metric.name].append(abs(value.value - at) <= value.floor)
                holds[one.metric.name].append(value.low <= at <= value.high)
        score = style_score(found["people"])
        scores += [] if score is None else [score[0].value]
        print(f"draw {draw + 1}: {seconds[-1]:.1f} s, score {scores[-1] if scores else 'none'}", flush=True)
    rows = [
        {
            "texts": options.name, "metric": metric.name, "kind": metric.kind, "draws": len(within[metric.name]),
            "within": np.mean(within[metric.name]), "holds": np.mean(holds[metric.name]), "count": count,
            "length": options.length, "halves": options.halves, "score": np.mean(scores),
            "seconds": np.median(seconds), **about("cpu"),
        }
        for metric in metrics
        if within[metric.name]
    ]  # fmt: skip
    for row in rows:
        print(f"{row['metric']:30} within {row['within']:.2f}, interval holds 0 {row['holds']:.2f}, of {row['draws']}")
    if options.csv is not None:
        kept = []
        if options.csv.exists():
            with options.csv.open(encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if row["texts"] != options.name]
        write_csv(options.csv, [*kept, *rows])


if __name__ == "__main__":
    main()
