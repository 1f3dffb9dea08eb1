"""What a vocabulary over several processes costs on this machine: python bench/sharded.py [--csv FILE]

Processes of one thread each over gloo, bf16, forward and backward, every process with V / n rows of the head. Of each
case, medians of interleaved rounds in which all processes run, in ms:

    whole      one call over all of V, in every process at once: what one process would take under the same load
    half       one call over this process's rows alone, as if they were a vocabulary, in every process at once
    exchange   the collectives of a call alone, of its sizes, none of them overlapped
    divided    the call with process_group
    ratio      divided over half + exchange, median of the rounds' ratios, and their quartiles
    *_mib      peak of what a call allocates beside its arguments, scratch included, and the bytes of the head here
    sent       bytes that leave a process in a call, counted, and by the formula of bench/scale.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dft_kernels import TeacherHead, linear_distribution_loss, release_scratch
from dft_kernels.backends.extension import MODULE
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.distributed import shards, sums
from dft_kernels.testing import record_allocations

sys.path.append(str(Path(__file__).parent))
from scale import collectives

CASES = {  # the numbers of a row in each of a chunk's exchanges of statistics
    "cross_entropy": ({}, (3,)),
    "forward_kl": ({}, (6, 2)),
    "jensen_shannon": ({}, (6, 2)),
}
CHUNK = 512  # rows, the native backend's


class Traffic:
    """Counts what this process gives to collectives, as they are called."""

    def __init__(self, count: int) -> None:
        self.count, self.bytes, self.calls = count, 0, list[tuple[str, Tensor]]()
        gather, exchange = shards.all_gather, dist.all_to_all_single

        def all_gather(out: Tensor, mine: Tensor, **more: Any) -> Any:
            self.add("gather", mine, (count - 1) * mine.numel() * mine.element_size())
            return gather(out, mine, **more)

        def all_to_all(out: Tensor, mine: Tensor, **more: Any) -> Any:
            self.add("exchange", mine, (count - 1) * mine.numel() * mine.element_size() // count)
            return exchange(out, mine, **more)

        shards.all_gather = sums.all_gather = all_gather
        dist.all_to_all_single = all_to_all  # type: ignore[assignment]
        self.gather, self.exchange = gather, exchange

    def add(self, kind: str, mine: Tensor, bytes_: int) -> None:
        self.bytes += bytes_
        self.calls.append((kind, mine))

    def replay(self, calls: list[tuple[str, Tensor]]) -> None:
        """The same collectives again, one after the other."""
        for kind, mine in calls:
            flat = mine.reshape(-1)
            if kind == "gather":
                self.gather(flat.new_empty(self.count * flat.numel()), flat)
            else:
                self.exchange(torch.empty_like(flat), flat)


def seconds(call: Callable[[], Any]) -> float:
    """Of the slowest process, which all wait for."""
    dist.barrier()
    begun = time.perf_counter()
    call()
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def measured(name: str, shape: tuple[int, int, int], rounds: int, traffic: Traffic) -> dict[str, Any]:
    """One row of the table."""
    n, h, v = shape
    options, exchanges = CASES[name]
    rank, count = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator).to(torch.bfloat16)

    hidden, weight = normal(n, h).requires_grad_(), 0.05 * normal(v, h)
    target = torch.randint(0, v, (n,), generator=generator)
    teacher = None if name == "cross_entropy" else TeacherHead(normal(n, h), 0.05 * normal(v, h))
    own = slice(v * rank // count, v * (rank + 1) // count)
    mine, label = weight[own].clone().requires_grad_(), target % (own.stop - own.start)
    weight.requires_grad_()
    part = None if teacher is None else TeacherHead(teacher.hidden, teacher.weight[own].clone())
    if teacher is not None:
        options = {**options, "divergence": name}

    def run(weight: Tensor, target: Tensor, teacher: Any, **more: Any) -> None:
        loss = linear_distribution_loss(hidden, weight, target, teacher, **options, **more)
        torch.autograd.grad(loss, (hidden, weight))

    runs: dict[str, Callable[[], None]] = {
        "whole": lambda: run(weight, target, teacher),
        "half": lambda: run(mine, label, part),
        "divided": lambda: run(mine, target, part, process_group=dist.group.WORLD),
    }
    peaks = {}
    for kind, call in runs.items():
        call()
        release_scratch()  # else it is there before the call
        with record_allocations() as found:
            call()
        peaks[kind] = found.peak + MODULE.pool_bytes()
    traffic.bytes, traffic.calls = 0, []
    runs["divided"]()
    sent, calls = traffic.bytes, list(traffic.calls)
    runs["exchange"] = lambda: traffic.replay(calls)
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds):
        kinds = list(runs)
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            times[kind].append(seconds(runs[kind]))
    ratios = [d / (w + e) for d, w, e in zip(times["divided"], times["half"], times["exchange"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    formula = (count - 1) * 9 * 8 + sum(one.leaves for one in collectives(count, n, h, CHUNK, exchanges))
    return {
        **{"loss": name, "processes": count, "n": n, "h": h, "v": v},
        **{f"{kind}_ms": f"{1e3 * statistics.median(of):.1f}" for kind, of in times.items()},
        **{"ratio": f"{statistics.median(ratios):.3f}", "ratio_25": f"{low:.3f}", "ratio_75": f"{high:.3f}"},
        **{f"{kind}_mib": f"{peaks[kind] / 2**20:.0f}" for kind in ("whole", "divided")},
        **{"head_mib": f"{weight.nbytes / 2**20:.0f}", "own_head_mib": f"{mine.nbytes / 2**20:.0f}"},
        **{"sent": sent, "formula": formula},
    }


def work(rank: int, count: int, folder: str, options: argparse.Namespace) -> None:
    """One process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    traffic, rows = Traffic(count), []
    for name in CASES:
        rows.append({**measured(name, tuple(options.shape), options.rounds, traffic), **about("cpu")})
        if rank == 0:
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if rank == 0 and options.csv is not None:
        write_csv(options.csv, rows)
    dist.destroy_process_group()


def main() -> None:
    """Measure; print a line a case."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=3, default=[1024, 576, 49152], metavar=("N", "H", "V"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=None, help="where to write the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (options.processes, folder, options), nprocs=options.processes)


if __name__ == "__main__":
    main()
