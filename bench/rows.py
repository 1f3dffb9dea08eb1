"""Times of the row kernels alone, by design, against the bytes that they must move: python bench/rows.py [--out FILE]

A launch reads logits [R, V] (and a target's), and writes statistics and the gradient. R V is about 2^28; times are
scaled to 8192 rows. TB/s: (bytes of a logit, of its target's, of the gradient) R V over the time; the copy of the first
line, counted alike, is what the memory gives. `apart`: how far a gradient is from the generic kernel's, relative, in
the 2-norm; both are of one rounding to bf16.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dft_kernels.backends import extension
from dft_kernels.backends.contract import DIFFERENTIABLE, Row, bits

LOGITS, ROWS = 1 << 28, 8192
VOCABULARIES = (128256, 49152, 151936, 32000, 16384, 8192, 4096, 1024)
DESIGNS = ("cuda lean", "cuda generic", "triton")


class Work(NamedTuple):
    """What a launch computes: log q_y or not, a divergence or none; of logits and target logits of these dtypes."""

    name: str
    hard: bool
    divergence: str | None
    logits: torch.dtype
    target: torch.dtype | None = None


def works() -> Iterator[Work]:
    """What matters most first."""
    wide, narrow = torch.float32, torch.bfloat16
    for logits in (wide, narrow):
        yield Work("cross_entropy", True, None, logits)
        for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
            for target in (wide, narrow) if logits == wide else (narrow,):
                yield Work(name, False, name, logits, target)
        yield Work("ce_and_kl", True, "forward_kl", logits, narrow)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """The median of seven, each of four calls."""
    if device != "cuda":
        call()
        return float("nan")
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(4):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 4)
    return statistics.median(times[2:])


def launches(work: Work, vocab: int, device: str, logits: int) -> dict[str, Callable[[], Tensor]]:
    """Of each design that takes the work: a function that launches it and returns the gradient."""
    count = max(1, min(1 << 16, logits // vocab))
    generator = torch.Generator(device).manual_seed(vocab)

    def drawn(dtype: torch.dtype) -> Tensor:
        return 2 * torch.randn(count, vocab, generator=generator, device=device).to(dtype)

    z = drawn(work.logits)
    target = None if work.target is None else drawn(work.target)
    label = torch.randint(0, vocab, (count,), generator=generator, device=device)
    soft = frozenset({Row.DIVERGENCE}) if work.divergence else frozenset()
    asked = bits((frozenset({Row.LOG_PROB}) if work.hard else frozenset()) | soft)
    cotangents = torch.zeros(DIFFERENTIABLE, count, device=device)
    cotangents[Row.LOG_PROB], cotangents[Row.DIVERGENCE] = -1.0 / count, 1.0 / count
    shared = {
        "logits": z,
        "scale": 1.0,
        "cap": None,
        "label": label if work.hard else None,
        "group": None,
        "potential": None,
        "target": target,
        "target_scale": 1.0,
        "target_cap": None,
        "divergence": work.divergence or "forward_kl",
        "parameter": 0.5,
        "temperature": 1.0,
        "target_temperature": 1.0,
    }

    def of(kernels: Any, **more: Any) -> Callable[[], Tensor]:
        rows = kernels.Rows(**shared, **more)
        out = torch.empty(count, vocab, dtype=torch.bfloat16, device=device)

        def call() -> Tensor:
            kernels.row_step(rows, asked, asked, cotangents, None, out)
            return out

        return call

    found = {}
    if extension.CUDA is not None:
        rows = extension.CUDA.Rows(**shared, design="lean")
        if extension.CUDA.chosen_design(rows, asked, asked, torch.empty_like(z, dtype=torch.bfloat16)) == "lean":
            found["cuda lean"] = of(extension.CUDA, design="lean")
        found["cuda generic"] = of(extension.CUDA, design="generic")
    if device == "cuda":
        import triton_ops

        found["triton"] = of(triton_ops)
    return found


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="a CSV")
    options.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    options.add_argument("--designs", nargs="+", default=DESIGNS, choices=DESIGNS)
    options.add_argument("--dry-run", action="store_true", help="few logits, on a CPU")
    given = options.parse_args(arguments)
    device, logits = ("cpu", 1 << 13) if given.dry_run else ("cuda", LOGITS)
    if device == "cuda":
        one, other = torch.empty(2, LOGITS, dtype=torch.bfloat16, device=device)
        took = milliseconds(lambda: other.copy_(one), device)
        print(f"{torch.cuda.get_device_name()}: copy {4e-9 * LOGITS / took:.2f} TB/s")
        del one, other
    table, failed = [], 0
    for vocab in given.vocab:
        for work in works() if not given.dry_run else list(works())[:2]:
            calls = launches(work, vocab, device, logits)
            calls = {name: call for name, call in calls.items() if name in given.designs or name == "cuda generic"}
            exact = calls["cuda generic"]().float() if "cuda generic" in calls else None
            size = work.logits.itemsize + (work.target.itemsize if work.target else 0) + 2
            dtypes = "/".join(str(d).removeprefix("torch.") for d in (work.logits, work.target) if d is not None)
            about = f"V {vocab:6d} {work.name:14s} {dtypes:17s}"
            for name, call in calls.items():
                if name not in given.designs:
                    continue
                try:
                    took = milliseconds(call, device)
                    apart = float("nan") if exact is None else float((call().float() - exact).norm() / exact.norm())
                except Exception as error:
                    print(f"{about} {name:12s} {type(error).__name__}: {error}"[:160])
                    failed += 1
                    continue
                count = len(call())
                ms, speed = took * ROWS / count, 1e-9 * size * count * vocab / took
                print(f"{about} {name:12s} {ms:8.3f} ms {speed:5.2f} TB/s, apart {apart:.1e}")
                table.append((vocab, work.name, dtypes, name, f"{ms:.4f}", f"{speed:.3f}", f"{apart:.2e}"))
            del calls, exact
    if given.out:
        with given.out.open("w", newline="") as file:
            csv.writer(file).writerows([("vocab", "work", "dtypes", "design", "ms_8192_rows", "TB/s", "apart"), *table])
    if failed:
        print(f"{failed} failed")
    if not table:
        print(f"nothing was run: {extension.CUDA_REASON or 'no design takes these rows'}")
    return 1 if failed or not (table or given.dry_run) else 0


if __name__ == "__main__":
    sys.exit(main())
