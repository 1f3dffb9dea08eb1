"""What a loss is measured against: the floor, which is the bare products, and the ceilings of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs
from .problems import LOSSES, Case

FLOOR_BYTES = 1 << 33  # of the floor's product [N, V]; beyond it, equal slices of rows
FLUSH_BYTES = 256 << 20  # more than any L2 holds
QUICK = 50.0  # ms of what is measured again, or at a larger size
FIRST_ROWS = 4  # that the products of two dtypes are compared over
LONG = 1000.0  # ms of them after which they are compared over no more rows, and of what a first call may set up
CLEAR = 4.0  # times as long: more than reading twice the bytes explains, and not tried over more rows


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


class Floor:
    """The products that no implementation can do without, into preallocated outputs; dtype: that they are made in, by
    default the inputs'."""

    def __init__(self, case: Case, dtype: torch.dtype | None = None) -> None:
        self.case, self.dtype = case, dtype or case.torch_dtype
        n, h, v = case.shape
        slices = math.ceil(n * v * self.dtype.itemsize / FLOOR_BYTES)
        self.rows = math.ceil(n / slices)
        self.logits = torch.zeros(self.rows, v, dtype=self.dtype, device=case.device).normal_(std=1e-3)
        self.dhidden = torch.empty(n, h, dtype=self.dtype, device=case.device)
        self.dweight = torch.empty(v, h, dtype=self.dtype, device=case.device)
        self.copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def operands(self, x: Inputs) -> Inputs:
        """The inputs in the floor's dtype, in the same memory each time; made before the clock starts."""
        if x.weight.dtype == self.dtype:
            return x
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
            given = getattr(x, name)
            if name not in self.copies:
                self.copies[name] = torch.empty_like(given, dtype=self.dtype, requires_grad=False)
            self.copies[name].copy_(given)
        return replace(x, **self.copies)

    def products(self, operands: Inputs) -> list[Callable[[], Any]]:
        """Each of them, in order."""
        x, loss, product = operands, LOSSES[self.case.loss], torch.mm
        made: list[Callable[[], Any]] = []
        # the gradients' products read logits of any kind; where there is a forward, they read what it made
        for hidden, teacher, dhidden in zip(
            x.hidden.split(self.rows), x.teacher_hidden.split(self.rows), self.dhidden.split(self.rows), strict=True
        ):
            logits = self.logits[: len(hidden)]
            if self.case.part != "backward":
                if loss.forward == 2:
                    made.append(partial(product, teacher, x.teacher_weight.t(), out=logits))
                made.append(partial(product, hidden, x.weight.t(), out=logits))
            if self.case.part != "forward":
                made.append(partial(product, logits, x.weight, out=dhidden))
                made.append(partial(product, logits.t(), hidden, out=self.dweight))
        return made

    @torch.no_grad()
    def __call__(self, operands: Inputs) -> None:
        for product in self.products(operands):
            product()


def floor_dtype(case: Case, x: Inputs) -> torch.dtype:
    """The dtype in which this machine makes the bare products sooner: the inputs' own, or fp32.

    Both are timed over the first rows, then over four times as many, and so on: until these are all, or one took
    `LONG`, or `CLEAR` times as long as the other. On a CPU without instructions for bf16 that may be a hundred times as
    long, and minutes for all rows: then it is given up at its first product.
    """
    own, wide = case.torch_dtype, torch.float32
    if case.device == "cuda" or own.itemsize >= wide.itemsize:
        return own
    rows, clock = FIRST_ROWS, Clock(case.device)
    while True:
        rows = min(rows, case.shape.n)
        few, part = x.first(rows), case._replace(shape=case.shape._replace(n=rows))
        floor, narrow = Floor(part, wide), Floor(part)
        operands = floor.operands(few)
        wide_ms = _best(clock, partial(floor, operands))
        with torch.no_grad():
            most = CLEAR * wide_ms + LONG  # of a first call, which may set up more than it computes
            for product in narrow.products(few):
                most -= clock(product)
                if most < 0:
                    return wide
        own_ms = _best(clock, partial(narrow, few))
        faster, slower = sorted((own_ms, wide_ms))
        if rows == case.shape.n or slower > LONG or slower > CLEAR * faster:
            return own if own_ms == faster else wide
        rows *= 4


def _best(clock: Clock, call: Callable[[], Any]) -> float:
    """The least of two calls, and of more while they are quick: other work on the machine disturbs those most."""
    took = [clock(call), clock(call)]
    while len(took) < 10 and sum(took) < 4 * QUICK:
        took.append(clock(call))
    return min(took)


def ceilings(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches: the rate of a large square product in `dtype`, FLOP/s, and of a large copy, bytes read
    and written a second. The better of three. The product grows while it is quick, for machines that are slow."""
    clock = Clock(case.device)
    most = 8192 if case.device == "cuda" else 2048
    size = most // 8
    a, b, c = (torch.randn(most, most, device=case.device).to(dtype) for _ in range(3))

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
