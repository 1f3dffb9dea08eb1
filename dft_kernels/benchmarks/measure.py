"""The measurements themselves, made inside a worker: time against the floor, peak memory, distance to float64."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.extension import release_scratch
from ..testing import dense_loss, relative_error
from .implementations import Call, Implementation, labels_and_teacher, terms
from .inputs import Inputs
from .problems import LOSSES, RANDOM, Case, Shape

ORACLE_FLOPS = {"cpu": 1e12, "cuda": 1e14}  # float64 work that errors may cost; beyond it, fewer rows
FLOOR_BYTES = 1 << 33  # of the floor's product [N, V]; beyond it, equal slices of rows
FLUSH_BYTES = 256 << 20  # more than any L2 holds


# ---- time ----


class Clock:
    """Milliseconds of a call: of events on CUDA, with the L2 cache overwritten before; of the wall on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()  # type: ignore[no-untyped-call]
        call()
        end_event.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event)


def timed(case: Case, call: Call, x: Inputs, clock: Clock) -> float:
    """Milliseconds of the part of a loss that the case asks for. Gradients are gone before and after, as between the
    steps of a training: who keeps memory for the next step finds it."""
    x.forget_gradients()
    if case.part == "forward":
        frozen = x.detached()
        with torch.no_grad():
            return clock(lambda: call(frozen))
    took = clock(call(x).backward) if case.part == "backward" else clock(lambda: call(x).backward())
    x.forget_gradients()
    return took


class Floor:
    """The products that no implementation can do without, into preallocated outputs."""

    def __init__(self, case: Case) -> None:
        (n, h, v), dtype = case.shape, case.torch_dtype
        self.case = case
        slices = math.ceil(n * v * dtype.itemsize / FLOOR_BYTES)
        self.rows = math.ceil(n / slices)
        self.logits = torch.zeros(self.rows, v, dtype=dtype, device=case.device).normal_(std=1e-3)
        self.dhidden = torch.empty(n, h, dtype=dtype, device=case.device)
        self.dweight = torch.empty(v, h, dtype=dtype, device=case.device)

    @torch.no_grad()
    def __call__(self, x: Inputs) -> None:
        loss = LOSSES[self.case.loss]
        # the gradients' products read logits of any kind; where there is a forward, they read what it made
        for hidden, teacher, dhidden in zip(
            x.hidden.split(self.rows), x.teacher_hidden.split(self.rows), self.dhidden.split(self.rows), strict=True
        ):
            logits = self.logits[: len(hidden)]
            if self.case.part != "backward":
                if loss.forward == 2:
                    torch.mm(teacher, x.teacher_weight.t(), out=logits)
                torch.mm(hidden, x.weight.t(), out=logits)
            if self.case.part != "forward":
                torch.mm(logits, x.weight, out=dhidden)
                torch.mm(logits.t(), hidden, out=self.dweight)


def input_sets(case: Case, memory: int, file: Path | None = None) -> list[Inputs]:
    """Up to three sets of inputs, fewer where they would take more than a quarter of the memory."""
    count = max(1, min(3, int(0.25 * memory / case.input_bytes())))
    return [Inputs.make(case, seed, file) for seed in range(count)]


def rounds_for(first: float, rounds: int, seconds: float) -> int:
    """How often a call of `first` milliseconds is measured: as often as fits `seconds`, and once anyhow."""
    return max(1, min(rounds, int(1e3 * seconds / max(first, 1e-3))))


QUICK = 50.0  # ms of a product after which one of twice the size, 8 times the work, is not tried


def ceilings(case: Case) -> dict[str, float]:
    """What this machine reaches: the rate of a large square product, FLOP/s, and of a large copy, bytes read and
    written a second. The better of three. The product grows while it is quick: a CPU that has no bf16 instructions
    would take minutes for a large one."""
    clock = Clock(case.device)
    most = 8192 if case.device == "cuda" else 2048
    size = most // 8
    a, b, c = (torch.randn(most, most, device=case.device).to(case.torch_dtype) for _ in range(3))

    def product() -> None:
        torch.mm(a[:size, :size], b[:size, :size], out=c[:size, :size])

    product()  # which may set up more than it computes
    while size < most and clock(product) < QUICK:
        size *= 2
    source = torch.ones((1 << 30) if case.device == "cuda" else (256 << 20), dtype=torch.int8, device=case.device)
    sink = torch.empty_like(source)

    def copy() -> None:
        sink.copy_(source)

    def best(call: Callable[[], Any]) -> float:
        call()
        return min(clock(call) for _ in range(3)) / 1e3

    return {"product_flops": 2.0 * size**3 / best(product), "copy_bytes": 2.0 * len(source) / best(copy)}


class Race:
    """Rounds of the floor and an implementation, each pair on the same inputs, which turn from round to round."""

    def __init__(self, case: Case, sets: list[Inputs]) -> None:
        self.case, self.sets = case, sets
        self.clock, self.floor = Clock(case.device), Floor(case)
        for x in sets:
            self.floor(x)

    def pair(self, call: Call, number: int) -> tuple[float, float]:
        """Milliseconds of the floor, and of the call after it, in this round."""
        x = self.sets[number % len(self.sets)]
        bare = self.clock(lambda: self.floor(x))
        return bare, timed(self.case, call, x, self.clock)


def turned(names: list[str], number: int) -> list[str]:
    """The order in a round: another each time, so that none always follows the same one."""
    return random.Random(number).sample(names, len(names))


# ---- memory ----


def limit_memory(bytes_: int, device: str) -> None:
    """From here on this process cannot take more than `bytes_` beside what it has; asking for more is an error in it
    alone."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, bytes_ / total))
    elif sys.platform == "linux":
        data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + bytes_, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch, the C++ runtime or Python say so."""
    said = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error).lower() for text in said)


def give_back() -> None:
    """Return what caches hold to the system."""
    gc.collect()
    release_scratch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library; what it keeps is not counted


def peak_bytes(case: Case, implementation: Implementation, call: Call, x: Inputs) -> int | None:
    """Peak memory of one call over that just before it, returned gradients included.

    Buffers that libraries allocate once are not the loss's, so a call of a few rows and words goes before; of this
    shape, where something compiles or tunes itself for a shape. None where the system does not say.
    """
    shaped = implementation.compiled or case.device == "cuda"
    small = x if shaped else Inputs.make(case._replace(shape=Shape(8, case.shape.h, 64), inputs=RANDOM), 0)
    timed(case, call, small, Clock(case.device))
    small.forget_gradients()
    del small
    give_back()

    def run() -> None:
        if case.part == "forward":
            with torch.no_grad():
                call(x.detached())
        else:
            call(x).backward()

    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    except OSError:
        return None
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


# ---- errors ----


class Exact:
    """A loss and its gradients in float64, by autograd on full logits, some rows at a time."""

    def __init__(self, case: Case, x: Inputs) -> None:
        n, h, v = case.shape
        affordable = int(ORACLE_FLOPS[case.device] / (8 * h * v))
        self.inputs = x if affordable >= n else x.first(max(1, affordable))
        x = self.inputs
        self.rows = len(x.hidden)
        step = max(1, (256 << 20) // (8 * v))
        weight = x.weight.detach().double().requires_grad_()
        losses, dhidden = [], []
        for start in range(0, self.rows, step):
            part = Inputs(
                x.hidden.detach()[start : start + step].double().requires_grad_(),
                weight,
                x.target[start : start + step],
                x.teacher_hidden[start : start + step],
                x.teacher_weight,
                None if x.teacher_logits is None else x.teacher_logits[start : start + step],
            )
            target, teacher = labels_and_teacher(part, case.loss)
            loss = dense_loss(part.hidden, weight, target, teacher, reduction="sum", **terms(case.loss))
            loss.backward()  # adds to weight.grad
            losses.append(loss.detach())
            assert part.hidden.grad is not None
            dhidden.append(part.hidden.grad)
        assert weight.grad is not None
        self.loss = torch.stack(losses).sum() / self.rows
        self.dhidden, self.dweight = torch.cat(dhidden).div_(self.rows), weight.grad.div_(self.rows)

    def errors(self, call: Call) -> dict[str, float]:
        """Relative distances, in the 2-norm, of a call's loss and gradients."""
        x = self.inputs
        x.forget_gradients()
        loss = call(x)
        loss.backward()
        assert x.hidden.grad is not None
        assert x.weight.grad is not None
        found: dict[str, tuple[Tensor, Tensor]] = {
            "loss": (loss, self.loss),
            "dhidden": (x.hidden.grad, self.dhidden),
            "dweight": (x.weight.grad, self.dweight),
        }
        errors = {name: relative_error(value, exact) for name, (value, exact) in found.items()}
        x.forget_gradients()
        return {**errors, "rows": self.rows}
