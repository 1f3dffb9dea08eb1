r"""Active columns: the two products of dlogits, of some of its columns, within a stated error.

Most columns of dlogits D [R, V] hold next to nothing over the rows of a chunk. Each product leaves out a part E of
them, its own. What the gradients miss by that, in the Frobenius norm:

    dweight  E^T hidden: a row of it is sum_r E_rv h_r, of a norm of at most reached_v = sum_r |E_rv| ||h_r||, so that
             all of it is at most (sum over v of (sum over chunks that left v out of reached_v)^2)^(1/2)
    dhidden  E W, of which a part is put back and the rest is bounded (sketch.py); chunks have rows of their own, so the
             squares of their bounds add

The relative error of a gradient g that was computed with a bound b is at most b / (||g|| - b), since the exact one has
at least the norm ||g|| - b; `dropped` is the larger of the two.

Kept are the columns with the largest sums of squares (dhidden) and the largest reach (dweight), so that the bounds are
within gradient_error times the norms to be expected. Of dhidden that is what the last chunk's was to the norm of its D,
of dweight the norm so far and as much more as the last chunk added; the first chunk's are estimated by projections.
So a call whose chunks' shares of dweight cancel may end above gradient_error; `dropped` says so. Columns of a chunk's
labels and of its teacher's likeliest tokens are always kept.

What is done with numbers of columns [V] is done in numpy, on the host: it is little, and a parallel loop over so few
would wait for a thread wherever other processes keep the processors busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dtypes import accumulate_dtype
from . import gemm
from .extension import scratch
from .sketch import Sketch, normal

_WORTH = 0.25  # of a product of a whole chunk: what must be left out, or gathering costs more
PREPARES = 1000  # rows of a product that take as long as what a call prepares, at H 576; fewer at a larger H
_TRIES = 3  # at a set of columns whose bound holds
FIRST = 4.5  # the first guess of dhidden's bound, over ||E|| times the RMS norm of a row of W (I - P^T P)
SAFETY = 1.06  # the guess of a later chunk, over what the last one's was
SOME = 64  # rows of the first chunk that the first norm of dhidden is estimated from
_CAUTION = 0.9  # about that of dweight,
PROBES = 16  # directions that the first dweight's norm is estimated in
_AGAIN = 0.95  # of what dweight may miss, where that was exceeded
_LEVELS = 256  # of columns, a quarter of an octave each


Numbers = np.ndarray[Any, np.dtype[np.float64]]  # [V]
Mask = np.ndarray[Any, np.dtype[np.bool_]]  # [V]


class Spread(NamedTuple):
    """How far each column of dlogits reaches: sum_r D_rv^2 and sum_r |D_rv| ||h_r|| [V], in the accumulation dtype."""

    squares: Tensor
    reached: Tensor


def reach(hidden: Tensor) -> Tensor:
    """||h_r|| [R]."""
    return torch.linalg.vector_norm(hidden, dim=1, dtype=accumulate_dtype(hidden.dtype))


def spread_of(dlogits: Tensor, hidden: Tensor) -> Spread:
    """Of [R, V] and [R, H]."""
    norms = reach(hidden)
    found = Spread(*norms.new_zeros(2, dlogits.shape[1]))
    for rows in gemm.tiles(dlogits):
        tile = dlogits[rows].to(norms.dtype)
        found.squares.add_(tile.square().sum(0))
        found.reached.add_(norms[rows] @ tile.abs())
    return found


def kept(values: Numbers, budget: float) -> Mask:
    """The mask [V] of all but the smallest values, which sum up to at most `budget`."""
    with np.errstate(divide="ignore"):
        octaves = np.log2(values / (values.max() or 1.0))
    level = np.maximum(np.floor(4 * octaves) + _LEVELS - 1, 0).astype(np.int64)
    sums = np.bincount(level, values, _LEVELS).cumsum()
    return level >= min(np.count_nonzero(sums <= budget), _LEVELS - 1)


AddProducts = Callable[[Tensor, Tensor, Tensor, Tensor], float]  # see `ActiveColumns.products`


class _Gathered(NamedTuple):
    """columns [m + V, R]: m rows that are free, then those of dlogits.T in the order of `order` [V]: kept for dhidden
    alone, for both products, for dweight alone, for none. counts: of the first three; kept: for dweight."""

    order: Tensor
    columns: Tensor
    counts: tuple[int, int, int]
    kept: Mask

    @property
    def free(self) -> int:
        """m."""
        return len(self.columns) - len(self.order)

    @property
    def of_hidden(self) -> int:
        """How many are kept for dhidden."""
        return self.counts[0] + self.counts[1]

    @property
    def of_weight(self) -> slice:
        """Where those kept for dweight are in the order."""
        only, both, more = self.counts
        return slice(only, only + both + more)


class _Hidden:
    """What is known of dhidden [R, H] of the chunks so far, and how the next one's columns are chosen."""

    def __init__(self, error: float, weight: Tensor, dtype: torch.dtype) -> None:
        self.error, self.weight, self.sketch = error, weight, Sketch.make(weight, dtype)
        self.squares = self.bounds = 0.0  # sums of squares: of what was computed, of the bounds of what it misses
        self.bound = 0.0  # the last chunk's
        self.growth: float | None = None  # the last chunk's square over that of its D
        outside = self.sketch.projected[:, len(self.sketch.subspace) :]
        self.missed = FIRST * _norm(outside) / math.sqrt(max(1, outside.numel()))  # the last chunk's bound over ||E||

    def allowed(self, dlogits: Tensor, total: float) -> float:
        """What the chunk may miss. total: its sum of squares."""
        if self.growth is None:
            some = dlogits[:: max(1, len(dlogits) // SOME)]
            own = _norm(some) ** 2  # 0: none of these rows has a gradient
            self.growth = float(self.sketch.norm(some @ self.sketch.projected)) ** 2 / own if own > 0 else 0.0
        square = self.error**2 * (self.squares + self.growth * total) - self.bounds
        return math.sqrt(square) if 0 < square < math.inf else 0.0

    @property
    def free(self) -> int:
        """Rows that `multiply` needs in front of the columns."""
        return len(self.sketch.subspace)

    def sides(self, gathered: _Gathered) -> Tensor:
        """What is left out, projected [R, m + s]."""
        start = gathered.of_hidden
        return gathered.columns[gathered.free + start :].t() @ self.sketch.projected[gathered.order[start:]]

    def multiply(self, gathered: _Gathered, sides: Tensor, dlogits: Tensor, total: float, out: Tensor) -> int:
        """dhidden: the columns that are kept, and the subspace's share of the others as m columns more; all columns
        where the norm is so much less than expected that the bound is too large for it. Returns how many."""
        free, used, columns = self.free, gathered.of_hidden, gathered.columns
        rows = scratch([free + used, out.shape[1]], columns.dtype, columns.device)
        rows[:free] = self.sketch.subspace
        taken, into = gathered.order[:used], rows[free:]
        if rows.dtype == self.weight.dtype:
            torch.index_select(self.weight, 0, taken, out=into)
        else:
            into.copy_(self.weight.index_select(0, taken))
        columns[:free] = sides[:, :free].t()
        left = columns[: free + used].t()
        _product(left, rows, out)
        square = _norm(out) ** 2
        if self.bounds > self.error**2 * (self.squares + square):
            self.bounds -= self.bound**2
            used = len(self.weight)
            _product(dlogits, self.weight, out)
            square = _norm(out) ** 2
        self.growth = square / total
        self.squares += square
        return used


class _Weight:
    """What is known of dweight [V, H] so far, and how the next chunk's columns are chosen."""

    def __init__(self, error: float) -> None:
        self.error = error
        self.square = self.norm = 0.0
        self.added: float | None = None  # to the norm, by the last chunk
        self.left: Numbers | None = None  # the reach left out so far

    def allowed(self, dlogits: Tensor, hidden: Tensor) -> float:
        """The reach that the chunk may leave out."""
        if self.added is None:
            probes = normal(hidden.shape[1], PROBES, hidden).to(hidden.dtype)
            expected = _CAUTION * _norm(dlogits.t() @ (hidden @ probes).to(dlogits.dtype)) / math.sqrt(PROBES)
        else:
            expected = self.norm + max(0.0, self.added if self.added < self.norm else 0.5 * self.added)
        return max(0.0, self.error * expected - self.bound()) if expected < math.inf else 0.0

    def bound(self) -> float:
        """Of what it misses."""
        return 0.0 if self.left is None else _length(self.left)

    def multiply(self, gathered: _Gathered, hidden: Tensor, reached: Numbers, out: Tensor, add: AddProducts) -> int:
        """dweight += the columns that are kept, times hidden, and more of them where the norm is less than expected.
        Returns how many."""
        some, free, columns = gathered.of_weight, gathered.free, gathered.columns
        used = some.stop - some.start
        before, bound, left = self.norm, self.bound(), np.where(gathered.kept, 0.0, reached)
        self._add(out, gathered.order[some], columns[free + some.start : free + some.stop], hidden, add)
        if left.any() and bound + _length(left) > self.error * self.norm:
            more = kept(left**2, max(0.0, _AGAIN * self.error * self.norm - bound) ** 2) & (left > 0)
            places = torch.from_numpy(more).to(out.device)[gathered.order].nonzero()[:, 0]
            self._add(out, gathered.order[places], columns.index_select(0, places + free), hidden, add)
            left[more] = 0.0
            used += len(places)
        self.added = self.norm - before
        self.left = left if self.left is None else self.left + left
        return used

    def _add(self, out: Tensor, ids: Tensor, left: Tensor, right: Tensor, add: AddProducts) -> None:
        self.square += add(out, ids, left, right)
        self.norm = math.sqrt(max(0.0, self.square))


class ActiveColumns:
    """The columns that a call multiplies, chunk after chunk. error: gradient_error; weight: the head [V, H]; rows: of
    all chunks."""

    def __init__(self, error: float, weight: Tensor, rows: int) -> None:
        self.error, self.weight, self.rows = error / (1.0 + error), weight, rows  # error: of what is computed
        self.pays = True  # False: the rest of the call is dense
        self._hidden: _Hidden | None = None  # made where it is first needed: it costs products of its own
        self._weight = _Weight(self.error)
        self._left_out = 0  # numbers of dlogits, of both products

    def report(self, dhidden: Tensor | None, dweight: Tensor | None) -> Tensor:
        """[2] in float64: the bound of the relative error of both gradients, and the share of the columns that was
        multiplied."""
        square = 0.0 if self._hidden is None else self._hidden.bounds
        known = torch.tensor(
            [math.sqrt(square), self._weight.bound(), self._left_out], dtype=torch.float64, device="cpu"
        )
        of_hidden, of_weight, left_out = known.to(self.weight.device)
        wanted = (dhidden is not None) + (dweight is not None)
        bounds = ((dhidden if known[0] > 0 else None, of_hidden), (dweight if known[1] > 0 else None, of_weight))
        return reported(bounds, left_out, wanted * self.rows * len(self.weight))

    def products(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        always: Sequence[Tensor | None],
        dhidden: Tensor | None,
        dweight: Tensor | None,
        first: bool,
        spread: Spread | None = None,
        add: AddProducts = gemm.add_products_,
    ) -> bool:
        """dhidden, written, and dweight, written (first) or added to, of a chunk; False: neither, their products are to
        be dense.

        dlogits: [R, V], of any strides; always: ids of columns that are kept, those outside of 0..V-1 aside; spread:
        where it is known; add(out, ids [n], left [n, R], right [R, H]): out[ids] += left @ right, by which the sum of
        squares of `out` grows as much as it returns."""
        wanted = (dhidden is not None) + (dweight is not None)
        found = None
        if self.pays and wanted:
            spread = spread or spread_of(dlogits, hidden)
            found = self._chosen(dlogits, hidden, spread, always, dhidden is not None, dweight is not None)
        if found is None:
            self.pays = False
            return False
        gathered, sides, total, reached = found
        if dhidden is not None and self._hidden is not None and sides is not None:
            used = self._hidden.multiply(gathered, sides, dlogits, total, dhidden)
            self._left_out += (len(gathered.order) - used) * len(hidden)
        if dweight is not None:
            if first:
                dweight.zero_()
            used = self._weight.multiply(gathered, hidden, reached, dweight, add)
            self._left_out += (len(gathered.order) - used) * len(hidden)
        return True

    def _chosen(
        self,
        dlogits: Tensor,
        hidden: Tensor,
        spread: Spread,
        always: Sequence[Tensor | None],
        of_hidden: bool,
        of_weight: bool,
    ) -> tuple[_Gathered, Tensor | None, float, Numbers] | None:
        """A chunk's columns, what dhidden leaves out, projected, the sum of squares of all, and their reach; None: all
        are to be multiplied."""
        squares, reached = (x.double().cpu().numpy() for x in spread)
        total, vocab = float(squares.sum()), len(squares)
        if not 0 < total < math.inf or not np.isfinite(reached).all():
            return None
        fixed = np.zeros(vocab, dtype=np.bool_)
        for ids in always:
            if ids is not None:
                known = ids.cpu().numpy()
                fixed[known[(known >= 0) & (known < vocab)]] = True

        def worth(*masks: Mask) -> bool:
            saved = sum(1.0 - np.count_nonzero(mask) / vocab for mask in masks)  # products
            return bool(saved >= _WORTH and saved * self.rows >= PREPARES)

        roughly = kept(squares, self.error**2 * total)  # seldom fewer: what is left out adds up in the products
        if not worth(*(roughly,) * (of_hidden + of_weight)):
            return None
        by_weight = [fixed] * of_weight
        if of_weight and (top := reached.max()) > 0:
            by_weight = [kept((reached / top) ** 2, (self._weight.allowed(dlogits, hidden) / top) ** 2) | fixed]
        none = np.zeros_like(fixed)
        if not of_hidden:
            return (_gathered(dlogits, none, by_weight[0]), None, total, reached) if worth(*by_weight) else None
        of = self._hidden = self._hidden or _Hidden(self.error, self.weight, dlogits.dtype)
        allowed, missed = of.allowed(dlogits, total), of.missed
        for _ in range(_TRIES):
            gathered = sides = None  # before others are made
            mask = kept(squares, (allowed / missed) ** 2 if missed > 0 else math.inf) | fixed
            if not worth(mask, *by_weight):
                return None
            gathered = _gathered(dlogits, mask, by_weight[0] if of_weight else none, of.free)
            sides = of.sides(gathered)
            bound = float(of.sketch.residual(sides))
            left_out = math.sqrt(squares[~mask].sum())
            if not math.isfinite(bound):
                return None
            if left_out > 0 and bound > 0:
                missed = of.missed = SAFETY * bound / left_out
            if bound <= allowed:
                of.bound = bound
                of.bounds += bound**2
                return gathered, sides, total, reached
        return None


def reported(bounds: Sequence[tuple[Tensor | None, Tensor]], left_out: Tensor, products: int) -> Tensor:
    """[2] in float64: the largest relative error of gradients, by the bounds of what they miss, and the share of the
    columns that was multiplied. left_out: numbers of dlogits that all products left out; products: how many they have.
    0-d in float64. The norms are in the accumulation dtype: in float64 they would be of a copy."""
    worst = torch.zeros_like(left_out)
    for gradient, bound in bounds:
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=accumulate_dtype(gradient.dtype))
            least = norm.double() - bound
            relative = torch.where((least > 0) & least.isfinite(), bound / least, math.inf)
            worst = worst.maximum(relative.where(bound > 0, 0.0))
    return torch.stack([worst, 1.0 - left_out / max(1, products)])


def _gathered(dlogits: Tensor, of_hidden: Mask, of_weight: Mask, free: int = 0) -> _Gathered:
    """All columns, by the masks of those that are kept."""
    parts = (of_hidden & ~of_weight, of_hidden & of_weight, ~of_hidden & of_weight, ~of_hidden & ~of_weight)
    groups = [np.flatnonzero(mask) for mask in parts]
    order = torch.from_numpy(np.concatenate(groups)).to(dlogits.device)
    columns = scratch([free + len(order), dlogits.shape[0]], dlogits.dtype, dlogits.device)
    if dlogits.stride(0) == 1:
        torch.index_select(dlogits.t(), 0, order, out=columns[free:])
    else:
        columns[free:] = dlogits.index_select(1, order).t()
    return _Gathered(order, columns, (len(groups[0]), len(groups[1]), len(groups[2])), of_weight)


def _product(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """dhidden; dlogits may be wider than `out`."""
    if dlogits.dtype == out.dtype:
        gemm.dhidden_(dlogits, weight, out)
    else:
        out.copy_(dlogits @ weight.to(dlogits.dtype))


def _length(x: Numbers) -> float:
    return math.sqrt(float(np.square(x).sum()))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=accumulate_dtype(x.dtype)))
