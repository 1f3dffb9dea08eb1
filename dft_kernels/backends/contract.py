"""The backend interface: the chunk step in two halves.

`chunk_statistics` turns a chunk of hidden states into row quantities and leaves the chunk's logits in the
workspace; `chunk_gradient` turns cotangents of those quantities into gradients. Nothing of size [R, V] leaves the
backend between the two halves. All row quantities are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from enum import IntEnum
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..divergences import Divergence
from ..teachers.contract import Head, Target
from .active import ActiveColumns
from .active_device import DeviceColumns


class Row(IntEnum):
    """The row quantities, as indices into a statistics tensor [len(Row), R].

    With z the model's logits, q = softmax(z), y the label, qT = softmax(z / T), p the target at its own
    temperature, f and g = df / dlog q the divergence's pair:
    """

    LOG_PROB = 0  # log q_y
    MEAN_LOG_PROB = 1  # sum_v log q_v / V, for label smoothing
    ENTROPY = 2  # -sum q log q
    LSE = 3  # log sum exp z
    DIVERGENCE = 4  # sum f(log qT, log p), over tokens or over a sparse target's outcomes
    POTENTIAL = 5  # <q, potential[group]>
    CORRECT = 6  # 1.0 where argmax z = y
    AGREEMENT = 7  # 1.0 where argmax z = argmax of the target's logits
    SOFT_LSE = 8  # log sum exp z / T              (for the gradient)
    TARGET_LSE = 9  # log sum exp of the target's logits / its temperature
    SLOPE = 10  # sum g, of a sparse target less its bucket's g / q (for the gradient)
    LSE_LOW = 11  # the rounding error of LSE: log q = (z - LSE) - LSE_LOW is accurate to an ulp of log q,
    SOFT_LSE_LOW = 12  # z - LSE alone only to an ulp of LSE, too little where q - p cancels
    TARGET_LSE_LOW = 13
    TOP = 14  # max z                             (where CORRECT or AGREEMENT is wanted, for a part of a vocabulary)
    TARGET_TOP = 15  # max of the target's logits      (where AGREEMENT is)


DIFFERENTIABLE = 6  # the rows of `Row` before CORRECT take cotangents


class Terms(NamedTuple):
    """What a call computes for every row, and its constants. `wanted`: the row quantities to compute; `differentiated`:
    the subset that may receive a non-zero cotangent. Other quantities may hold anything.

    Where the columns are a part of a vocabulary, SOFT_LSE and TARGET_LSE are wanted in place of DIVERGENCE, which
    `PartialBackend.chunk_sums` then sums under the log-sum-exps of the whole."""

    head: Head
    wanted: frozenset[Row]
    differentiated: frozenset[Row]
    divergence: Divergence
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    logits_dtype: torch.dtype = torch.float32  # that a chunk's logits are held in: the accumulation or the input dtype
    up: Tensor | None = None  # [V, r]: raw logits are hidden weight.T + down up.T + bias
    target_dtype: torch.dtype | None = None  # of the logits of chunks' dense targets, None: there are none
    columns: bool = False  # whether sums of q over rows are asked for
    potential: Tensor | None = None  # [G, V]
    features: Tensor | None = None  # [V, K], dense or sparse COO
    active: bool = False  # whether gradients may be made of some columns (`Backward.active`)

    @property
    def compared(self) -> bool:
        """Whether the model is compared with the target, or will be."""
        return Row.DIVERGENCE in self.wanted or Row.SOFT_LSE in self.wanted


class Chunk(NamedTuple):
    """One chunk of R rows. A label outside 0..V-1 gives LOG_PROB = NaN; a row of weight 0 is left out of
    the column sums."""

    hidden: Tensor  # [R, H], or [R, V] where the head has no weight
    label: Tensor | None = None  # [R] int64
    group: Tensor | None = None  # [R] int64, None: all rows are of group 0
    weight: Tensor | None = None  # [R] in the accumulation dtype, None: all 1
    target: Target | None = None
    down: Tensor | None = None  # [R, r], where the terms have `up`

    def part(self, rows: slice) -> Chunk:
        """Some of its rows."""
        own = {name: tensor[rows] for name, tensor in self._asdict().items() if isinstance(tensor, Tensor)}
        return self._replace(**own, target=None if self.target is None else self.target.part(rows))


class Outcomes(NamedTuple):
    """A sparse target's outcomes in the model: z, log qT and the slope g at its tokens [R, k], the sum of all g [R],
    and the log-sum-exp of z / T outside of its tokens, with its rounding error."""

    z: Tensor
    log_q: Tensor
    slope: Tensor
    total: Tensor
    tail: tuple[Tensor, Tensor]

    def part(self, rows: slice) -> Outcomes:
        """Those of some rows."""
        z, log_q, slope, total, (tail, low) = self
        return Outcomes(z[rows], log_q[rows], slope[rows], total[rows], (tail[rows], low[rows]))


class Statistics(NamedTuple):
    """The results of the first half: the row quantities [len(Row), R], q @ terms.features [R, K] where given, and the
    outcomes of a sparse target."""

    rows: Tensor
    features: Tensor | None = None
    outcomes: Outcomes | None = None


class Cotangents(NamedTuple):
    """d(what is differentiated) / d(row quantities): rows [DIFFERENTIABLE, R] and features [R, K]. A row whose
    cotangents are all zero gets an exactly zero gradient, whatever its logits hold.

    lse_slope [R]: LSE's cotangent is rows[LSE] + lse_slope * LSE, so that cotangents need no statistics.
    """

    rows: Tensor
    features: Tensor | None = None
    lse_slope: Tensor | None = None

    def part(self, rows: slice) -> Cotangents:
        """Those of some rows."""
        features = None if self.features is None else self.features[rows]
        return Cotangents(self.rows[:, rows], features, None if self.lse_slope is None else self.lse_slope[rows])

    def settled(self, statistics: Tensor) -> Tensor:
        """`rows` with lse_slope's share in LSE's cotangent. statistics: [len(Row), R]."""
        if self.lse_slope is None:
            return self.rows
        rows = self.rows.clone()
        rows[Row.LSE] += self.lse_slope * statistics[Row.LSE]
        return rows


class Backward(NamedTuple):
    """The inputs of a chunk's gradient and the buffers for its results. dhidden and ddown are written; dweight,
    dbias and dup are written by the first chunk and added to by the others, or written with the last chunk where the
    workspace keeps dlogits. None: not needed, so no product is made for it. active: who multiplies dlogits into dhidden
    and dweight where an error of them is allowed."""

    cotangents: Cotangents
    dhidden: Tensor | None  # [R, H] in the input dtype
    dweight: Tensor | None  # [V, H] in the accumulation dtype, or in the input dtype if it is written once
    dbias: Tensor | None  # [V] in the accumulation dtype
    first: bool
    last: bool
    ddown: Tensor | None = None  # [R, r] in the input dtype
    dup: Tensor | None = None  # [V, r] as dweight
    active: ActiveColumns | DeviceColumns | None = None


class Workspace(Protocol):
    """A backend's scratch for chunks of up to `rows` rows of one call, reused from chunk to chunk."""

    rows: int


W = TypeVar("W", bound=Workspace)


class Backend(ABC, Generic[W]):
    """A backend: the chunk step in two halves, and what the choice of backend and of chunk size depends on."""

    name: str
    best_rows: int  # chunks beyond this many rows gain nothing
    even_rows: int  # products are fastest where a chunk's rows are a multiple of this
    keeps: bool = False  # whether it can keep the dlogits of several chunks, for one product of dweight
    emulated: tuple[str, ...] = ()  # device types on which it is only emulated, for tests: never by "auto"
    overlaps: bool = False  # whether dhidden and ddown of all chunks are complete only with the last

    @abstractmethod
    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why inputs of `dtype` on `device` cannot be served, None if they can."""

    @abstractmethod
    def chunk_bytes(self, logits: torch.dtype, projected: bool, target: int) -> int:
        """Scratch bytes for one logit of a chunk. logits: their dtype; projected: the head has a weight; target: bytes
        for one logit of the target (`Problem.target_bytes`)."""

    def holds(self, terms: Terms, like: Tensor) -> torch.dtype:
        """The dtype that a chunk's logits, or what stands for them, are held in where a gradient follows; `like` gives
        dtype and device of the inputs."""
        return terms.logits_dtype

    @abstractmethod
    def workspace(self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool, kept: int = 0) -> W:
        """Scratch for chunks of up to `rows` rows under `terms`; `like` gives dtype and device of the inputs;
        `gradient`: whether gradients will be asked for; kept: rows whose dlogits are kept for one product."""

    @abstractmethod
    def chunk_statistics(self, workspace: W, chunk: Chunk, columns: Tensor | None) -> Statistics:
        """The row quantities and features of a chunk; adds weight * q into `columns` [G, V] where given. The chunk's
        logits stay in the workspace."""

    @abstractmethod
    def chunk_gradient(self, workspace: W, chunk: Chunk, found: Statistics, backward: Backward) -> None:
        """Gradients from the logits that the last `chunk_statistics`, which returned `found`, left in the workspace
        (which it may overwrite). Where a workspace was made for gradients, DIVERGENCE may have been left to this half,
        which then writes it into `found`: no cotangent depends on it."""

    def chunk_step(self, workspace: W, chunk: Chunk, columns: Tensor | None, backward: Backward) -> Statistics:
        """Both halves, where nothing is reduced over other rows or devices between them. A backend overrides it if one
        pass over the logits can serve both."""
        found = self.chunk_statistics(workspace, chunk, columns)
        self.chunk_gradient(workspace, chunk, found, backward)
        return found

    def active(self, error: float, weight: Tensor, rows: int) -> ActiveColumns | DeviceColumns:
        """Who multiplies some columns of a call's dlogits, within a relative error. rows: of all chunks."""
        return ActiveColumns(error, weight, rows)

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient *= factor [1] (in the accumulation dtype), where the device alone may know the factor."""
        torch.mul(gradient, factor, out=gradient)


class PartialBackend(Backend[W]):
    """A backend whose columns may be a part of a vocabulary, and then know no more of it than log-sum-exps."""

    @abstractmethod
    def chunk_sums(self, workspace: W, chunk: Chunk, found: Statistics, columns: Tensor | None) -> None:
        """What takes the log-sum-exps of a whole vocabulary, of which these columns are a part: between the two halves,
        with `found` holding these. Writes the columns' own share of DIVERGENCE and SLOPE of a dense target into
        `found`, where wanted, and adds weight * q into `columns` [G, V] where given."""


@functools.cache
def bits(rows: frozenset[Row]) -> int:
    """A set of rows as the kernels take it: bit `row` for each."""
    return sum(1 << row for row in rows)
