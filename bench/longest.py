"""The longest sequence that trains within a budget of memory: python bench/longest.py [--budget 4] [--csv FILE] ...

Gemma3-270M (V 262144; pip brings it, under the Gemma Terms of Use), batch 1, bf16 weights and gradients, plain SGD
(no state), activations recomputed layer by layer in every way, as long sequences are trained. A step is forward,
backward and update; its peak is the largest resident memory of its process from there on, weights and libraries
included. Each step runs in a process of its own, after a step of 16 tokens. The ways:

    transformers cross-entropy   labels= into the model: its own loss
    attached cross-entropy       the same call after attach(model)
    eager forward KL             log-softmax of both models' logits in fp32, F.kl_div; the teacher is a frozen copy
    attached forward KL          attach, and the frozen copy's hidden states in a TeacherHead

Lengths double from 256 until one does not fit; then the search interpolates, until one that fits and one that does not
are 5 % apart. What the allocator keeps differs from run to run, so the longest is run again; where it exceeds the
budget the next shorter one is run again, until one has fitted twice. A step may exceed the budget up to --limit, where
it is stopped; the plot shows it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dft_kernels import TeacherHead, attach
from dft_kernels.benchmarks.measure import give_back, is_out_of_memory
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.materials.models import cache_folder, gemma3
from dft_kernels.models.heads import hidden_states

GIB = 1 << 30
FIRST, COMMON, GRAIN = 256, 1024, 16  # the shortest length, one that all are measured at, what lengths are multiples of
RESOLUTION = 0.05


# ---- a step, in a process of its own ----


def transformers_cross_entropy(model: Any, teacher: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def eager_kl(model: Any, teacher: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    log_q = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q[0], log_p[0], log_target=True, reduction="batchmean")


def attached_kl(model: Any, teacher: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        rows = TeacherHead(hidden_states(teacher, ids), teacher.get_output_embeddings().weight)
    loss: Tensor = model(input_ids=ids, teacher=rows, use_cache=False).loss
    return loss


class Way(NamedTuple):
    """One way to compute the loss of a step."""

    loss: Callable[[Any, Any, Tensor], Tensor]
    attached: bool
    teacher: bool


WAYS = {
    "transformers cross-entropy": Way(transformers_cross_entropy, False, False),
    "attached cross-entropy": Way(transformers_cross_entropy, True, False),
    "eager forward KL": Way(eager_kl, False, True),
    "attached forward KL": Way(attached_kl, True, True),
}


def step(folder: str, way: Way, length: int) -> dict[str, Any]:
    """Peak bytes and seconds of one training step of the model in `folder`."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="auto").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = load(folder, dtype="auto").eval().requires_grad_(False) if way.teacher else None
    if way.attached:
        attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)

    def train(tokens: int) -> None:
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
        way.loss(model, teacher, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    train(16)
    give_back()
    # Not ru_maxrss: it begins at what the parent had, and cannot start again after loading
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.perf_counter()
    train(length)
    seconds = time.perf_counter() - begun
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return {"peak": peak, "seconds": seconds}


# ---- its parent ----


class Seen(NamedTuple):
    """Peak bytes and seconds of a step; None, None where it went over the limit."""

    peak: int | None
    seconds: float | None


def measure(folder: Path, way: str, length: int, limit: int) -> Seen:
    """One step in a fresh process, which is ended where its resident memory goes over `limit` bytes."""
    command = [sys.executable, __file__, "--step", str(folder), way, str(length)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaint:
        child = subprocess.Popen(command, stdout=said, stderr=complaint)
        try:
            while child.poll() is None:
                if _resident(child.pid) > limit:
                    return Seen(None, None)
                time.sleep(0.005)
        finally:
            child.kill()
            child.wait()
        said.seek(0)
        complaint.seek(0)
        lines, why = said.read().splitlines(), complaint.read().strip().splitlines()
    if child.returncode == 0 and lines:
        found = json.loads(lines[-1])
        return Seen(found["peak"], found["seconds"]) if found and found["peak"] <= limit else Seen(None, None)
    reason = why[-1] if why else "it said nothing"
    raise RuntimeError(f"longest: {way} at {length} must end well, got {child.returncode}: {reason}")


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


def longest(peak: Callable[[int], int | None], budget: int, most: int, resolution: float = RESOLUTION) -> int:
    """The longest length up to `most` whose peak is within budget: one that was measured, while one at most
    `resolution` longer was not within it. 0 if there is none. peak(length): bytes, None beyond what can be measured."""
    known: dict[int, int] = {}
    most = most // GRAIN * GRAIN
    low, high, length, same = 0, most + 1, min(FIRST, most), 0  # low fits, high does not
    while True:
        found = peak(length)
        if found is not None:
            known[length] = found
        fits = found is not None and found <= budget
        same = max(same, 0) + 1 if fits else min(same, 0) - 1  # how often it was that in a row
        low, high = (length, high) if fits else (low, length)
        apart = max(GRAIN, int(resolution * low) // GRAIN * GRAIN)
        if low == most or high <= GRAIN or (high <= most and high - low <= apart):
            return low
        if not low:
            length = max(GRAIN, high // 2 // GRAIN * GRAIN)
        elif high > most:
            length = _near((1 - resolution / 2) * _crossing(known, budget, low), low + apart, min(2 * low, most))
        elif abs(same) > 2:  # no line, then
            length = _near((low * high) ** 0.5, low + GRAIN, high - GRAIN)
        else:
            length = _near((1 - resolution / 2) * _crossing(known, budget, low), low + apart, high - GRAIN)


def confirmed(again: Callable[[int], int | None], fitting: list[int], budget: int) -> int:
    """The longest of the lengths that fitted once which fits again; 0 if there is none. again(length): as peak."""
    for length in sorted(fitting, reverse=True):
        found = again(length)
        if found is not None and found <= budget:
            return length
    return 0


def _near(guess: float, least: int, most: int) -> int:
    return int(min(most, max(least, guess))) // GRAIN * GRAIN


def _crossing(known: dict[int, int], budget: int, low: int) -> float:
    """Where the line through `low` and the known length above it, else below it, meets the budget."""
    lengths = sorted(known)
    at = lengths.index(low)
    if len(lengths) == 1:
        return float("inf")
    other = lengths[at + 1] if at + 1 < len(lengths) else lengths[at - 1]
    slope = (known[other] - known[low]) / (other - low)
    return low + (budget - known[low]) / slope if slope > 0 else float("inf")


# ---- all of it ----


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--budget", type=float, default=4.0, help="GiB that a step may take (default: %(default)s)")
    options.add_argument("--limit", type=float, default=None, help="GiB at which it is ended (default: twice that)")
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    options.add_argument("--csv", type=Path, default=None)
    options.add_argument("--plot", type=Path, default=None)
    options.add_argument("--cache", type=Path, default=cache_folder())
    options.add_argument("--step", nargs=3, metavar=("FOLDER", "WAY", "LENGTH"), help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.step:
        folder, way, length = chosen.step
        try:
            print(json.dumps(step(folder, WAYS[way], int(length))))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print("null")
        return 0
    budget = int(chosen.budget * GIB)
    limit = 2 * budget if chosen.limit is None else int(chosen.limit * GIB)
    model, _ = gemma3(chosen.cache)
    most = model.config.max_position_embeddings
    rows: list[dict[str, Any]] = []
    where = about("cpu")
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        del model, _
        give_back()
        for way in chosen.ways:
            runs: list[tuple[int, Seen]] = []

            def run(length: int, way: str = way, runs: list[tuple[int, Seen]] = runs) -> int | None:
                runs.append((length, measure(Path(folder), way, length, limit)))
                bytes_, seconds = runs[-1][1]
                said = "over the limit" if bytes_ is None else f"{bytes_ / GIB:.2f} GiB, {seconds:.1f} s"
                print(f"{way}, {length} tokens: {said}", flush=True)
                return bytes_

            first = {COMMON: run(COMMON)}

            def peak(length: int, run: Callable = run, first: dict[int, int | None] = first) -> int | None:
                if length not in first:
                    first[length] = run(length)
                return first[length]

            longest(peak, budget, most)
            best = confirmed(run, [n for n, found in first.items() if found is not None and found <= budget], budget)
            print(f"{way}: {best} tokens within {chosen.budget:g} GiB", flush=True)
            for length, (bytes_, seconds) in sorted(runs, key=lambda one: one[0]):
                rows.append({
                    "way": way,
                    "length": length,
                    "peak_bytes": "" if bytes_ is None else bytes_,
                    "seconds": "" if seconds is None else round(seconds, 2),
                    "within": int(bytes_ is not None and bytes_ <= budget),
                    "longest": int(length == best),
                    "budget_bytes": budget,
                    **where,
                })  # fmt: skip
    if chosen.csv is not None:
        write_csv(chosen.csv, rows)
    if chosen.plot is not None:
        plot(rows, chosen.plot)
    return 0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    budget = int(rows[0]["budget_bytes"]) / GIB
    axes.axhline(budget, color="0.4", linestyle="--", linewidth=1)
    axes.annotate(f"budget {budget:g} GiB", (FIRST, budget), (0, 4), textcoords="offset points", color="0.4")
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        mine = [row for row in rows if row["way"] == way and row["peak_bytes"] != ""]
        worst = {int(row["length"]): 0.0 for row in mine}
        for row in mine:
            worst[int(row["length"])] = max(worst[int(row["length"])], int(row["peak_bytes"]) / GIB)
        style = {"color": f"C{number // 2}", "linestyle": "-" if "attached" in way else ":"}
        axes.plot(list(worst), list(worst.values()), label=way, **style)
        every = [(int(row["length"]), int(row["peak_bytes"]) / GIB) for row in mine]
        axes.plot(*zip(*every, strict=True), ".", color=style["color"])
        for length in {int(row["length"]) for row in mine if int(row["longest"])}:
            axes.plot(length, worst[length], "o", color=style["color"])
            axes.annotate(
                f"{length}", (length, worst[length]), (-4, 6 + 12 * (number // 2)), textcoords="offset points",
                ha="right", color=style["color"], weight="bold",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.set(xlabel="sequence length, tokens", ylabel="peak memory of a training step, GiB", ylim=(0, None))
    axes.set_title("Gemma3-270M (V 262144), bf16, batch 1: one step's memory, and the longest within the budget")
    axes.title.set_fontsize(10)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
