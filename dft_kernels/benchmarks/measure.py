"""The measurements themselves, made inside a worker: time against the floor, peak memory, distance to float64."""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..backends.extension import release_scratch
from ..testing import dense_loss, relative_error
from .floor import Clock, Floor
from .implementations import Call, Implementation, labels_and_teacher, terms
from .inputs import Inputs
from .problems import RANDOM, Case, Shape

ORACLE_FLOPS = {"cpu": 1e12, "cuda": 1e14}  # float64 work that errors may cost; beyond it, fewer rows


# ---- time ----


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


def input_sets(case: Case, memory: int, file: Path | None = None) -> list[Inputs]:
    """Up to three sets of inputs, fewer where they would take more than a quarter of the memory."""
    count = max(1, min(3, int(0.25 * memory / case.input_bytes())))
    return [Inputs.make(case, seed, file) for seed in range(count)]


def rounds_for(first: float, rounds: int, seconds: float) -> int:
    """How often a call of `first` milliseconds is measured: as often as fits `seconds`, and once anyhow."""
    return max(1, min(rounds, int(1e3 * seconds / max(first, 1e-3))))


class Race:
    """Rounds of the floor and an implementation, each pair on the same inputs, which turn from round to round."""

    def __init__(self, case: Case, sets: list[Inputs], dtype: torch.dtype | None = None) -> None:
        """dtype: of the floor."""
        self.case, self.sets = case, sets
        self.clock, self.floor = Clock(case.device), Floor(case, dtype)
        for x in sets:
            self.floor(self.floor.operands(x))

    def bare(self, number: int) -> float:
        """Milliseconds of the floor in this round."""
        operands = self.floor.operands(self.sets[number % len(self.sets)])
        return self.clock(lambda: self.floor(operands))

    def call(self, call: Call, number: int) -> float:
        """Milliseconds of an implementation in this round: after the floor, on the same inputs."""
        return timed(self.case, call, self.sets[number % len(self.sets)], self.clock)


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


def warm_up(case: Case, implementation: Implementation, call: Call, x: Inputs) -> None:
    """The call before memory is measured, since buffers that libraries allocate once are not the loss's: of a few rows
    and words; of this shape, where something compiles or tunes itself for a shape."""
    shaped = implementation.compiled or case.device == "cuda"
    small = x if shaped else Inputs.make(case._replace(shape=Shape(8, case.shape.h, 64), inputs=RANDOM), 0)
    timed(case, call, small, Clock(case.device))
    small.forget_gradients()


def peak_bytes(case: Case, call: Call, x: Inputs) -> int | None:
    """Peak memory of one call over that just before it, returned gradients included. None where the system does not
    say."""
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

    def called(self, call: Call) -> Tensor:
        """A call's loss of the same inputs, which have its gradients then."""
        self.inputs.forget_gradients()
        loss = call(self.inputs)
        loss.backward()
        return loss.detach()

    def errors(self, loss: Tensor) -> dict[str, float]:
        """Relative distances, in the 2-norm, of what `called` found."""
        x = self.inputs
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
