"""What gradient_error saves and costs: python bench/active.py [--csv FILE]; python bench/active.py --train [--csv FILE]

Without --train: the loss over SmolLM2's hidden states and text, forward and backward, dense and within two errors,
in turn with the bare products (the floor), in one process. Of each:

    ratio     of its time to the floor's, median of the rounds, and their quartiles
    dropped   the bound that the call reports, and the share of columns that it multiplied
    d..._error  of its gradients, relative, to those of a dense call in fp32: rounding to the dtype is in it

With --train: the demo's student (every second layer of SmolLM2, towards its distributions), dense and within an error,
from one start, each with several seeds of the order of sequences: KL(teacher || student) on held-out text. Calls of so
few rows would be exact, since gathering does not pay: here they gather all the same. Runs that the CSV holds are kept.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dft_kernels import TeacherHead, linear_distribution_loss
from dft_kernels.backends import active
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.problems import DISTANCES, RANDOM, Case, Shape
from dft_kernels.benchmarks.real import prepared
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.materials.models import cache_folder

ERRORS = (0.001, 0.005)


def gradients(inputs: Inputs, taught: bool, error: float | None) -> tuple[list[torch.Tensor], Any]:
    """dhidden and dweight of one call, and its metrics."""
    teacher = TeacherHead(inputs.teacher_hidden, inputs.teacher_weight) if taught else None
    loss, metrics = linear_distribution_loss(
        inputs.hidden,
        inputs.weight,
        None if taught else inputs.target,
        teacher,
        gradient_error=error,
        return_metrics={"dropped"},
    )
    return list(torch.autograd.grad(loss, (inputs.hidden, inputs.weight))), metrics


def floor_of(inputs: Inputs, forward: int) -> Callable[[], None]:
    """The bare products, into outputs that are there."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for _ in range(forward):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    return run


def settle(device: str) -> None:
    """Wait for what the device is at."""
    if device == "cuda":
        torch.cuda.synchronize()


def measured(case: Case, rounds: int, cache: Path) -> list[dict[str, Any]]:
    """The rows of one loss."""
    file = None if case.inputs == RANDOM else prepared(case, cache, print).file
    inputs, taught = Inputs.make(case, 0, file), case.loss != "cross_entropy"
    wide = Inputs.make(case, 0, file)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(wide, name, getattr(wide, name).detach().float().requires_grad_(name in ("hidden", "weight")))
    exact, _ = gradients(wide, taught, None)
    del wide
    rows, runs = [], {"floor": floor_of(inputs, 1 + taught)}
    for error in (None, *ERRORS):
        found, metrics = gradients(inputs, taught, error)
        off = [float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True)]
        rows.append(
            {
                **{"loss": case.loss, "kl": case.distance, "n": case.shape.n, "h": case.shape.h, "v": case.shape.v},
                **{"dtype": case.dtype, "gradient_error": error or ""},
                "dropped": "" if error is None else f"{float(metrics.dropped):.2e}",
                "active": "" if error is None else f"{float(metrics.active_columns):.3f}",
                **{f"{name}_error": f"{x:.2e}" for name, x in zip(("dhidden", "dweight"), off, strict=True)},
            }
        )
        runs[str(error)] = lambda error=error: gradients(inputs, taught, error)
        del found
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            settle(case.device)
            begun = time.perf_counter()
            runs[name]()
            settle(case.device)
            times[name].append(time.perf_counter() - begun)
    for row, name in zip(rows, list(runs)[1:], strict=True):
        ratios = [own / bare for own, bare in zip(times[name], times["floor"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {"floor_ms": f"{1e3 * statistics.median(times['floor']):.0f}"}
        row |= {"ratio": f"{middle:.3f}", "ratio_25": f"{low:.3f}", "ratio_75": f"{high:.3f}", **about(case.device)}
    return rows


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all runs: a line a look at a model."""
    import tempfile

    import transformers

    from dft_kernels.evaluation.held_out import held_out
    from dft_kernels.materials.models import smollm2
    from dft_kernels.materials.sources import texts_of
    from dft_kernels.training.capture import capture
    from dft_kernels.training.comparison import HELD_OUT, Sizes, trained
    from dft_kernels.training.students import every_second_layer, pack

    transformers.utils.logging.disable_progress_bar()
    teacher, tokenizer = smollm2(options.cache)
    teacher = teacher.eval().requires_grad_(False)
    sizes = Sizes(options.steps, options.batch, options.length)
    sequences = list(pack(texts_of(["lambada"], options.cache), tokenizer, sizes.length)[: sizes.sequences])
    rows: list[dict[str, Any]] = []
    if options.csv is not None and options.csv.exists():
        with options.csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
        sizes_there = {(max(int(row["step"]) for row in rows), int(row["tokens"])) for row in rows}
        if sizes_there - {(sizes.steps, sizes.batch * sizes.length)}:
            wanted = f"{sizes.steps} steps of {sizes.batch * sizes.length} tokens"
            raise SystemExit(f"active: {options.csv} must hold runs of {wanted}, got others. Name another --csv.")
    done = {(int(row["seed"]), row["gradient_error"]) for row in rows if int(row["step"]) == sizes.steps}
    active.PREPARES = 0  # whatever it costs
    with tempfile.TemporaryDirectory() as folder:
        store = capture(teacher, tokenizer, sequences, Path(folder) / "teacher", name="teacher")
        batches = [store.batch(range(n, min(n + sizes.batch, HELD_OUT))) for n in range(0, HELD_OUT, sizes.batch)]
        plain = [{name: b[name] for name in ("input_ids", "attention_mask", "labels")} for b in batches]

        def look(model: Any) -> Any:
            each = iter(batches)
            return held_out(model, plain, lambda _: store.teacher(next(each), model.device))

        student = every_second_layer(teacher).requires_grad_(True)
        for seed, error in product(options.seeds, (None, ERRORS[0])):
            if (seed, str(error or "")) in done:
                continue
            own, place = replace(sizes, seed=seed), Path(folder) / f"{seed}-{error}"
            run = trained(student, store, look, own, place, matches=True, loss_gradient_error=error)
            logs = [one for one in run.log if "loss" in one]
            for step, found in run.curve:
                near: dict[str, float] = next((one for one in reversed(logs) if one["step"] <= step), {})
                rows.append(
                    {
                        **{"seed": seed, "gradient_error": error or "", "step": step},
                        **{"tokens": sizes.batch * sizes.length, "kl": f"{found.kl:.5f}"},
                        "perplexity": f"{found.perplexity:.3f}",
                        **{name: near.get(name, "") for name in ("loss", "dropped", "active_columns")},
                        **about("cpu"),
                    }
                )
                print("  ".join(f"{name} {value}" for name, value in list(rows[-1].items())[:9]), flush=True)
            if options.csv is not None:
                write_csv(options.csv, rows)
    return rows


def main() -> None:
    """Measure; print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[4096, 576, 49152], metavar=("N", "H", "V"))
    parser.add_argument("--inputs", default="smollm2", choices=("smollm2", RANDOM), help="random ones: of any shape")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--csv", type=Path, default=None, help="where to write the table")
    options = parser.parse_args()
    if options.train:
        training(options)
        return
    rows: list[dict[str, Any]] = []
    distances = (0.0,) if options.inputs == RANDOM else DISTANCES[:2]
    for loss, distance in (("cross_entropy", 0.0), *(("forward_kl", distance) for distance in distances)):
        case = Case(Shape(*options.shape), options.dtype, loss, "both", options.device, options.inputs, distance)
        for row in measured(case, options.rounds, options.cache):
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
    if options.csv is not None:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
