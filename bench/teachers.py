"""What a stored teacher costs and what it is worth: python bench/teachers.py [--steps 20] [--csv FILE] [--plot FILE]

SmolLM2-135M in bf16 over LAMBADA passages (both from pip), captured as hidden states and as top k; then a student of
every second layer, trained by the running teacher and from each store for the same steps. For every teacher:

    bytes_a_token, capture_tokens_s    of the store; read_mb_s: sequences in random order, files in the page cache
    tail                               mean mass that the teacher has outside of the k tokens
    loss_ms, over_ce                   loss forward and backward with 0.1 cross-entropy at N 4096, and over
                                       cross-entropy alone; medians of interleaved rounds
    step_over_ce                       the same of a training step, fp32: backbone, optimiser, loss, reading the store
    kl_seen                            the loss over the exact KL, of the trained student on held-out text
    gradient_error                     of dhidden there, against the running teacher's, in the 2-norm
    apart, held_out_kl                 largest relative distance of the loss curve from the running teacher's exact
                                       KL curve's; exact KL after training
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dft_kernels import (
    Store,
    TeacherHead,
    TopK,
    capture,
    linear_cross_entropy,
    linear_distribution_loss,
    linear_distribution_statistics,
    shift_labels,
)
from dft_kernels.benchmarks.runs import about
from dft_kernels.benchmarks.tables import write_csv
from dft_kernels.materials.models import cache_folder, lambada, smollm2
from dft_kernels.models.heads import hidden_states
from dft_kernels.training.students import every_second_layer, pack

KS = (16, 64, 128, 1024)
LENGTH, BATCH, HELD_OUT = 128, 4, 32
HARD = 0.1
LIVE, CE = "running teacher", "cross-entropy alone"
TRAIN = ("hidden states", "top 16", "top 128")  # the stores that students are trained from


class Trainee:
    """A model, its optimiser and one loss of (hidden, head weight, labels, teacher); keeps the loss and the seconds
    spent in it for every step."""

    def __init__(self, model: Any, loss: Any, learning_rate: float, warmup: int) -> None:
        """warmup: steps over which the learning rate rises linearly. Adam's eps lies above the rounding of a
        small gradient: at 1e-8 it steps by the sign of what is noise, and equal runs drift apart by 1 %."""
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, eps=1e-5, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0 / warmup, total_iters=warmup - 1)
        self.losses: list[float] = []
        self.seconds: list[float] = []  # loss forward and backward, without the backbone

    @property
    def head(self) -> Tensor:
        """The head's weight [V, H]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def step(self, ids: Tensor, labels: Tensor, teacher: Any) -> None:
        """One optimiser step. The graph is cut between backbone and loss, so that the loss is timed alone; the
        gradients are those of the whole."""
        hidden = hidden_states(self.model, ids)
        leaf = hidden.detach().requires_grad_()
        started = time.perf_counter()
        loss = self.loss(leaf, self.head, labels, teacher)
        loss.backward()
        self.seconds.append(time.perf_counter() - started)
        hidden.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))


def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Any) -> Tensor:
    loss: Tensor
    if teacher is None:
        loss = linear_cross_entropy(hidden, weight, labels)
    else:
        loss = linear_distribution_loss(hidden, weight, labels, teacher, hard_weight=HARD)
    return loss


class Stores:
    """A capture in each kind, and how fast it was."""

    def __init__(self, model: Any, tokenizer: Any, sequences: list[Tensor], folder: Path) -> None:
        self.stores: dict[str, Store] = {}
        self.speed: dict[str, float] = {}
        tokens = sum(map(len, sequences))
        for name, kind, k in [("hidden states", "hidden", 1), *((f"top {k}", "topk", k) for k in KS)]:
            begun = time.perf_counter()
            self.stores[name] = capture(model, tokenizer, sequences, folder / name.replace(" ", "-"), kind, k=k)
            self.speed[name] = tokens / (time.perf_counter() - begun)
            print(f"captured {name}: {self.speed[name]:.0f} tokens/s", flush=True)


def read_speed(store: Store) -> float:
    """MB/s of sequences in random order."""
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0)).tolist()
    store[0]
    begun = time.perf_counter()
    for number in order:
        store[number]
    return store.bytes / (time.perf_counter() - begun) / 1e6


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            begun = time.perf_counter()
            calls[name]()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def losses_at(stores: Stores, head: Tensor, rounds: int, rows: int = 4096) -> dict[str, float]:
    """Milliseconds of the loss at N `rows`, bf16, reading the store left out."""
    generator = torch.Generator().manual_seed(0)
    numbers = [n % len(next(iter(stores.stores.values()))) for n in range(-(-rows // LENGTH))]
    weight = head.bfloat16().detach().requires_grad_()
    hidden = torch.randn(len(numbers), LENGTH, weight.shape[1], generator=generator).bfloat16().requires_grad_()
    teachers: dict[str, Any] = {CE: None}
    for name, store in stores.stores.items():
        teachers[name] = store.teacher(store.batch(numbers))
        labels = shift_labels(store.batch(numbers)["labels"])

    def step(teacher: Any) -> None:
        hidden.grad = weight.grad = None
        loss_of(hidden, weight, labels, teacher).backward()

    return timed({name: (lambda t=t: step(t)) for name, t in teachers.items()}, rounds)


def steps_of(stores: Stores, student: Any, rounds: int) -> dict[str, float]:
    """Seconds of a training step of BATCH sequences, fp32: the backbone's and the optimiser's, which are the same for
    all (and more than the differences), and each teacher's reading and loss, medians of interleaved rounds."""
    trainee = Trainee(copy.deepcopy(student), loss_of, 1e-4, 10)
    ways: dict[str, Store | None] = {CE: None, **stores.stores}
    first, numbers = next(iter(stores.stores.values())), list(range(BATCH))
    own: dict[str, list[float]] = {name: [] for name in ways}
    rest = []
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            begun = time.perf_counter()
            store = ways[name]
            batch = (store or first).batch(numbers)
            teacher = None if store is None else store.teacher(batch)
            read = time.perf_counter() - begun
            trainee.step(batch["input_ids"], shift_labels(batch["labels"]), teacher)
            if number:
                rest.append(time.perf_counter() - begun - read - trainee.seconds[-1])
                own[name].append(read + trainee.seconds[-1])
    return {name: statistics.median(rest) + statistics.median(seconds) for name, seconds in own.items()}


def train(
    stores: Stores, model: Any, student: Any, numbers: list[list[int]]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Exact-KL curves of students trained by the running teacher and from each store, the same steps."""
    names = [LIVE, *TRAIN]
    trainees = {name: Trainee(copy.deepcopy(student), loss_of, 1e-4, 10) for name in names}
    curves: dict[str, list[float]] = {name: [] for name in names}
    first = next(iter(stores.stores.values()))
    for number, some in enumerate(numbers):
        ids = first.batch(some)["input_ids"]
        live = running(model, ids)
        for name, trainee in trainees.items():
            with torch.no_grad():  # before the step, what every one of them would be told by the exact teacher
                curves[name].append(float(exact(trainee.model, ids, live).mean()))
            store = stores.stores.get(name)
            teacher = live if store is None else store.teacher(store.batch(some))
            trainee.step(ids, shift_labels(ids), teacher)
        print(f"step {number + 1}: " + ", ".join(f"{name} {curves[name][-1]:.4f}" for name in names), flush=True)
    return curves, {name: trainee.model for name, trainee in trainees.items()}


@torch.no_grad()
def running(model: Any, ids: Tensor) -> TeacherHead:
    return TeacherHead(hidden_states(model, ids), model.get_output_embeddings().weight.detach())


def exact(student: Any, ids: Tensor, teacher: Any) -> Tensor:
    """KL of each token [B, T]."""
    found = linear_distribution_statistics(
        hidden_states(student, ids), student.get_output_embeddings().weight, teacher=teacher
    )
    assert found.divergence is not None
    return found.divergence


def worth(stores: Stores, model: Any, student: Any, held_out: list[int]) -> dict[str, dict[str, float]]:
    """Of each store on held-out sequences: mean tail, the loss it sees over the exact one, the error of dhidden."""
    first = next(iter(stores.stores.values()))
    ids = first.batch(held_out)["input_ids"]
    with torch.no_grad():
        hidden = hidden_states(student, ids)
    weight = student.get_output_embeddings().weight.detach()

    def told(teacher: Any) -> tuple[float, Tensor]:
        leaf = hidden.detach().requires_grad_()
        loss = linear_distribution_loss(leaf, weight, teacher=teacher)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient

    value, gradient = told(running(model, ids))
    out = {}
    for name, store in stores.stores.items():
        teacher = store.teacher(store.batch(held_out))
        seen, found = told(teacher)
        out[name] = {
            "tail": float(teacher.tail_log_prob.exp().mean()) if isinstance(teacher, TopK) else 0.0,
            "kl_seen": seen / value,
            "gradient_error": float((found - gradient).norm() / gradient.norm()),
        }
    return out


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--csv", type=Path, default=None)
    options.add_argument("--plot", type=Path, default=None)
    options.add_argument("--cache", type=Path, default=cache_folder())
    chosen = options.parse_args(arguments)
    source, tokenizer = smollm2(chosen.cache)
    model = copy.deepcopy(source).to(torch.bfloat16).eval().requires_grad_(False)
    student = every_second_layer(source).requires_grad_(True)
    count = chosen.steps * BATCH + HELD_OUT
    sequences = list(pack(lambada(chosen.cache), tokenizer, LENGTH)[:count])
    with tempfile.TemporaryDirectory() as folder:
        stores = Stores(model, tokenizer, sequences, Path(folder))
        at_4096 = losses_at(stores, source.get_output_embeddings().weight, chosen.rounds)
        steps = steps_of(stores, student, chosen.rounds)
        numbers = torch.arange(HELD_OUT, count).view(-1, BATCH).tolist()
        held_out = list(range(HELD_OUT))
        curves, students = train(stores, model, student, numbers)
        value = worth(stores, model, students[LIVE], held_out)
        ids = stores.stores["hidden states"].batch(held_out)["input_ids"]
        after = {}
        for name, trained in students.items():
            with torch.no_grad():
                after[name] = float(exact(trained, ids, running(model, ids)).mean())
        rows = []
        for name in [CE, LIVE, *stores.stores]:
            store = stores.stores.get(name)
            curve = curves.get(name)
            rows.append({
                "teacher": name,
                "bytes_a_token": round(store.bytes / store.rows, 1) if store else "",
                "capture_tokens_s": round(stores.speed[name], 1) if store else "",
                "read_mb_s": round(read_speed(store), 1) if store else "",
                **(value[name] if store else {"tail": "", "kl_seen": "", "gradient_error": ""}),
                "loss_ms": at_4096[name] * 1e3 if name in at_4096 else "",
                "over_ce": at_4096[name] / at_4096[CE] if name in at_4096 else "",
                "step_over_ce": steps[name] / steps[CE] if name in steps else "",
                "apart": max(abs(a / b - 1) for a, b in zip(curve, curves[LIVE], strict=True)) if curve else "",
                "held_out_kl": after.get(name, ""),
                "steps": chosen.steps,
                **about("cpu"),
            })  # fmt: skip
    if chosen.csv is not None:
        write_csv(chosen.csv, rows)
    if chosen.plot is not None:
        plot(curves, chosen.plot)
    for line in rows:
        print({name: line[name] for name in list(line)[:12]})
    return 0


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(range(1, len(curve) + 1), curve, label=name, linewidth=6.0 / (1 + number) ** 0.8)
    axes.set(xlabel="step", ylabel="exact KL, nats a token", title="Students of the running teacher, and of its stores")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
