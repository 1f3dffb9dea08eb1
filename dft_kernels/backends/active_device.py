r"""Active columns chosen by the device, so that the host waits for nothing: as in active.py, with these differences.

    one set       of columns for both products: those that either needs
    one try       the device's numbers decide how far a kernel goes, not what is launched. Columns are ordered, kept
                  ones first; products are of a span of them that the device knows, and are launched again over the
                  rest, which is empty unless a bound did not hold: then that product is of all columns.
    no question   whether it pays, beyond the number of rows. Where nearly all columns are kept, a call takes longer
                  than the dense one.

Bounds and reports are the same. Columns are counted and summed over in integers, in whatever order the device takes
them, so that calls can be repeated bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import active, gemm
from .sketch import Sketch, normal

_CAUTION = 0.8  # about norms that are known only afterwards: of what a product may miss
_UNITS = 1 << 50  # that a sum of values is counted in
_ALIGN = 16  # spans begin and end at multiples of it


def smallest(values: Tensor, budget: Tensor) -> Tensor:
    """The mask of the smallest values [V] (in fp64, not negative) that sum up to at most `budget`; none where they are
    all 0, or not finite."""
    unit = values.sum() / _UNITS
    counted = (values / unit).nan_to_num(0.0, 0.0, 0.0).ceil().long()
    within = (budget / unit).nan_to_num(0.0).clamp(max=2.0 * _UNITS).long()
    in_order = counted.sort().values
    fit = (in_order.cumsum(0) <= within).sum().clamp(max=len(values) - 1)
    return counted < in_order.index_select(0, fit[None])


def ordered(left: Tensor) -> tuple[Tensor, Tensor]:
    """The columns as `triton_ops.active` takes them, those that a mask [V] leaves out last; where these begin."""
    vocab = len(left)
    kept = ~left
    begin = (kept.sum() + _ALIGN - 1) // _ALIGN * _ALIGN
    place = torch.where(kept, kept.cumsum(0), begin + left.cumsum(0)) - 1
    order = torch.full([-(-vocab // _ALIGN) * _ALIGN + _ALIGN], vocab, dtype=torch.int64, device=left.device)
    return order.scatter_(0, place, torch.arange(vocab, device=left.device)), begin


class _Gathered:
    """Columns of a chunk [R, len(order)], and the two spans of their order; kernels: see `DeviceColumns`."""

    def __init__(self, kernels: Any, dlogits: Tensor, left: Tensor) -> None:
        self.kernels, self.dlogits = kernels, dlogits
        self.order, self.begin = ordered(left)  # of what is left out
        self.columns = dlogits.new_empty(len(dlogits), len(self.order))
        self.kept = torch.stack([torch.zeros_like(self.begin), self.begin])
        self.take(self.kept)

    def take(self, span: Tensor) -> None:
        """Fill the columns of a span."""
        self.kernels.gather(self.dlogits, self.order, span, self.columns)

    def rest(self, wanted: Tensor) -> Tensor:
        """The span of what is left out, if it is wanted (0-d), else an empty one."""
        end = torch.full_like(self.begin, len(self.order))
        return torch.stack([torch.where(wanted, self.begin, end), end])

    def add_dhidden(self, span: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [R, H] += the product of a span with rows of weight [V, H]."""
        self.kernels.add_dhidden(self.columns, self.order, span, weight, out)

    def add_dweight(self, span: Tensor, hidden: Tensor, out: Tensor) -> Tensor:
        """out [V, H] += the product of a span with hidden [R, H]; by how much its sum of squares grows."""
        grown: Tensor = self.kernels.add_dweight(self.columns, self.order, span, hidden, out)
        return grown


class _Hidden:
    """What is known of dhidden [R, H] of the chunks so far, 0-d in fp64, and of the one that is being made."""

    def __init__(self, error: float, weight: Tensor, dtype: torch.dtype) -> None:
        self.error, self.weight, self.sketch = error, weight, Sketch.make(weight, dtype)
        zero = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.squares, self.bounds = zero, zero  # sums of squares: of what was computed, of the bounds of what it misses
        self.growth: Tensor | None = None  # the last chunk's square over that of its D
        outside = self.sketch.projected[:, len(self.sketch.subspace) :]
        self.missed = active.FIRST * _norm(outside) / math.sqrt(max(1, outside.numel()))  # the last bound over ||E||
        self.bound, self.back, self.wide = zero, weight, weight  # of the chunk: see `choose` and `multiply`

    def choose(self, dlogits: Tensor, squares: Tensor, among: Tensor) -> Tensor:
        """The columns of a mask that are left out, and the bound of what dhidden misses by that; `back` [R, H]: what it
        gets back."""
        growth, first = self.growth, self.growth is None
        if growth is None:
            some = dlogits[:: max(1, len(dlogits) // active.SOME)]
            growth = (self.sketch.norm(some @ self.sketch.projected) / _norm(some)).square().nan_to_num(0.0, 0.0)
        allowed = self.error**2 * (self.squares + _CAUTION * growth * squares.sum()) - self.bounds
        for _ in range(1 + first):  # a call's first guess is not of its own columns
            left = among & smallest(squares, allowed.clamp(min=0.0) / self.missed.square())
            sides = dlogits @ self.sketch.projected.masked_fill(~left[:, None], 0.0)
            self.bound = self.sketch.residual(sides)
            found = active.SAFETY * self.bound / squares.where(left, 0.0).sum().sqrt()
            self.missed = torch.where((found > 0) & found.isfinite(), found, self.missed)
        free = len(self.sketch.subspace)
        self.back = gemm.wide_product(sides[:, :free], self.sketch.subspace)
        return left

    def multiply(self, some: _Gathered) -> Tensor:
        """Make dhidden of what is kept; whether that is too little."""
        self.wide = torch.zeros_like(self.back)
        some.add_dhidden(some.kept, self.weight, self.wide)
        square = _norm(self.wide + self.back).square()
        return ~(self.bounds + self.bound.square() <= self.error**2 * (self.squares + square))

    def finish(self, some: _Gathered, short: Tensor, total: Tensor, out: Tensor) -> None:
        """Write dhidden, of all columns where it was too little. total: the sum of squares of the chunk's D."""
        some.add_dhidden(some.rest(short), self.weight, self.wide)
        self.wide += self.back.masked_fill(short, 0.0)
        out.copy_(self.wide)
        square = _norm(self.wide).square()
        self.growth = (square / total).nan_to_num(0.0, 0.0)
        self.squares = self.squares + square
        self.bounds = self.bounds + self.bound.square().masked_fill(short, 0.0)


class _Weight:
    """What is known of dweight [V, H] so far, 0-d in fp64."""

    def __init__(self, error: float, weight: Tensor) -> None:
        self.error = error
        self.square = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.before = self.square  # its norm, without the chunk that is being made
        self.added: Tensor | None = None  # to the norm, by the last chunk
        self.left = self.square.new_zeros(len(weight))  # the reach left out so far

    def norm(self) -> Tensor:
        """Of what was computed."""
        return self.square.clamp(min=0.0).sqrt()

    def choose(self, dlogits: Tensor, hidden: Tensor, reached: Tensor) -> Tensor:
        """The columns that are left out."""
        norm = self.norm()
        if self.added is None:
            probes = normal(hidden.shape[1], active.PROBES, hidden).to(hidden.dtype)
            more = _norm(dlogits.t() @ (hidden @ probes).to(dlogits.dtype)) / math.sqrt(active.PROBES)
        else:
            more = torch.where(self.added < norm, self.added, 0.5 * self.added).clamp(min=0.0)
        allowed = _CAUTION * self.error * (norm + more) - _norm(self.left)
        return smallest(reached.square(), allowed.clamp(min=0.0).square())

    def multiply(self, some: _Gathered, hidden: Tensor, reached: Tensor, out: Tensor) -> Tensor:
        """dweight += what is kept, times hidden; whether that is too little. reached: [V], of what is left out."""
        self.before = self.norm()
        self.square = self.square + some.add_dweight(some.kept, hidden, out)
        enough = _norm(self.left) + _norm(reached) <= self.error * self.norm()
        return ~(enough & self.square.isfinite())  # squares of huge numbers, in fp32

    def finish(self, some: _Gathered, short: Tensor, hidden: Tensor, reached: Tensor, out: Tensor) -> None:
        """And the rest, where it was too little."""
        self.square = self.square + some.add_dweight(some.rest(short), hidden, out)
        self.added = self.norm() - self.before
        self.left = self.left + reached.masked_fill(short, 0.0)


class DeviceColumns:
    """The columns that a call multiplies, chunk after chunk. error: gradient_error; weight: the head [V, H]; rows: of
    all chunks; kernels: `triton_ops.active`, or what does the same."""

    def __init__(self, error: float, weight: Tensor, rows: int, kernels: Any) -> None:
        self.error, self.rows, self.kernels = error / (1.0 + error), rows, kernels  # error: of what is computed
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.pays = 2 * rows >= active.PREPARES  # if both products were saved
        self._hidden: _Hidden | None = None  # made where it is first needed: it costs products of its own
        self._weight = _Weight(self.error, weight)
        self._left_out = torch.zeros((), dtype=torch.float64, device=weight.device)  # numbers of dlogits, by products

    def report(self, dhidden: Tensor | None, dweight: Tensor | None) -> Tensor:
        """[2] in float64: the bound of the relative error of both gradients, and the share of the columns that was
        multiplied."""
        of_hidden = torch.zeros_like(self._left_out) if self._hidden is None else self._hidden.bounds.sqrt()
        bounds = ((dhidden, of_hidden), (dweight, _norm(self._weight.left)))
        wanted = (dhidden is not None) + (dweight is not None)
        return active.reported(bounds, self._left_out, wanted * self.rows * len(self.weight))

    def products(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        always: Sequence[Tensor | None],
        dhidden: Tensor | None,
        dweight: Tensor | None,
        first: bool,
    ) -> bool:
        """As `ActiveColumns.products`; dlogits of a stride of 1 along V."""
        if not self.pays or (dhidden is None and dweight is None):
            self.pays = False
            return False
        hidden = hidden.contiguous()
        squares, reached = (x.double() for x in self.kernels.spread(dlogits, active.reach(hidden)))
        total = squares.sum()
        left = self._free(always) & total.isfinite() & reached.isfinite().all()
        if dweight is not None:
            left = left & self._weight.choose(dlogits, hidden, reached)
        if dhidden is not None:
            self._hidden = self._hidden or _Hidden(self.error, self.weight, dlogits.dtype)
            left = self._hidden.choose(dlogits, squares, left)
        some = _Gathered(self.kernels, dlogits, left)
        reached = reached.where(left, 0.0)
        of_hidden = of_weight = torch.zeros_like(some.begin, dtype=torch.bool)  # whether all columns are wanted
        if dhidden is not None and self._hidden is not None:
            of_hidden = self._hidden.multiply(some)
        if dweight is not None:
            if first:
                dweight.zero_()
            of_weight = self._weight.multiply(some, hidden, reached, dweight)
        some.take(some.rest(of_hidden | of_weight))
        saved = left.sum() * len(dlogits)
        if dhidden is not None and self._hidden is not None:
            self._hidden.finish(some, of_hidden, total, dhidden)
            self._left_out = self._left_out + saved.masked_fill(of_hidden, 0)
        if dweight is not None:
            self._weight.finish(some, of_weight, hidden, reached, dweight)
            self._left_out = self._left_out + saved.masked_fill(of_weight, 0)
        return True

    def _free(self, always: Sequence[Tensor | None]) -> Tensor:
        """The mask [V] of columns that may be left out."""
        vocab = len(self.weight)
        fixed = torch.zeros(vocab + 1, dtype=torch.bool, device=self.weight.device)
        for ids in always:
            if ids is not None:
                known = (ids >= 0) & (ids < vocab)
                fixed.index_fill_(0, torch.where(known, ids, vocab).flatten().long(), True)
        return ~fixed[:vocab]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)
