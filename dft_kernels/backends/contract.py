"""What a backend is: the chunk step in two halves.

`chunk_statistics` turns a chunk of hidden states into row quantities (and leaves the chunk's logits in its
workspace); `chunk_gradient` turns cotangents of those quantities into gradients. Between the
two halves nothing of size [R, V] leaves the backend. All row quantities are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from ..divergences import Divergence
from ..teachers.contract import Head, Target


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
    LSE_LOW = 11  # what the rounding of LSE dropped: log q = (z - LSE) - LSE_LOW is good to an ulp of itself,
    SOFT_LSE_LOW = 12  # where z - LSE alone is good to one of LSE, and q - p cancels
    TARGET_LSE_LOW = 13


DIFFERENTIABLE = 6  # the rows of `Row` before CORRECT take cotangents


@dataclass(frozen=True)
class Terms:
    """What a call asks of every row, and its constants. `wanted` is what to compute, `differentiated` what may
    receive a non-zero cotangent (a subset); everything else may be left as it is."""

    head: Head
    wanted: frozenset[Row]
    differentiated: frozenset[Row]
    divergence: Divergence
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    up: Tensor | None = None  # [V, r]: raw logits are hidden weight.T + down up.T + bias
    dense: bool = False  # whether chunks come with a dense target
    potential: Tensor | None = None  # [G, V]
    features: Tensor | None = None  # [V, K], dense or sparse COO


@dataclass(frozen=True)
class Chunk:
    """One chunk of R rows. label outside 0..V-1 gives LOG_PROB = NaN; weight 0 means: out of the column sums."""

    hidden: Tensor  # [R, H], or [R, V] where the head has no weight
    label: Tensor | None = None  # [R] int64
    group: Tensor | None = None  # [R] int64, None: all rows are of group 0
    weight: Tensor | None = None  # [R] in the accumulation dtype, None: all 1
    target: Target | None = None
    down: Tensor | None = None  # [R, r], where the terms have `up`


@dataclass(frozen=True)
class Cotangents:
    """d(what is differentiated) / d(row quantities): rows [DIFFERENTIABLE, R] and features [R, K]. A row whose
    cotangents are all zero gets an exactly zero gradient, whatever its logits hold.

    lse_slope [R]: LSE's cotangent is rows[LSE] + lse_slope * LSE, so that cotangents need no statistics.
    """

    rows: Tensor
    features: Tensor | None = None
    lse_slope: Tensor | None = None

    def settled(self, statistics: Tensor) -> Tensor:
        """`rows` with LSE's cotangent whole."""
        if self.lse_slope is None:
            return self.rows
        rows = self.rows.clone()
        rows[Row.LSE] += self.lse_slope * statistics[Row.LSE]
        return rows


@dataclass(frozen=True)
class Gradients:
    """Where a chunk's gradient goes. dhidden and ddown are written; dweight, dbias and dup are written by the first
    chunk and added to by the others. None: not needed, and no product is spent on it."""

    dhidden: Tensor | None  # [R, H] in the input dtype
    dweight: Tensor | None  # [V, H] in the accumulation dtype, or in the input dtype if the chunk is the only one
    dbias: Tensor | None  # [V] in the accumulation dtype
    first: bool
    ddown: Tensor | None = None  # [R, r] in the input dtype
    dup: Tensor | None = None  # [V, r] as dweight


class Workspace(Protocol):
    """A backend's scratch for chunks of up to `rows` rows, reused from chunk to chunk."""

    rows: int


class Backend(Protocol):
    """A row of the backend table. `chunk_bytes` is what the planner multiplies: scratch bytes for one logit."""

    name: str
    best_rows: int  # chunks beyond this many rows gain nothing
    emulated: tuple[str, ...]  # device types on which it is only emulated, for tests: "auto" passes it by there

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why inputs of `dtype` on `device` cannot be served, None if they can."""

    def chunk_bytes(self, dtype: torch.dtype, projected: bool, target: int) -> int:
        """Scratch bytes for one logit of a chunk. projected: the head has a weight; target: what a logit of the target
        takes as it comes (`Problem.target_bytes`)."""

    def workspace(self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool) -> Workspace:
        """Scratch for chunks of up to `rows` rows; `like` gives dtype and device of the inputs; `gradient`:
        whether gradients will be asked for."""

    def chunk_statistics(
        self, workspace: Workspace, chunk: Chunk, terms: Terms, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Row quantities [len(Row), R] and features q @ terms.features [R, K]; adds weight * q into
        `columns` [G, V] where given. The chunk's logits stay in the workspace."""

    def chunk_gradient(
        self,
        workspace: Workspace,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        features: Tensor | None,
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> None:
        """Gradients from the logits that the last `chunk_statistics` left in the workspace (which it may spend).
        Where a workspace was made for gradients, DIVERGENCE may have been left to this half, which then writes it
        into `statistics`: no cotangent depends on it."""

    def chunk_step(
        self,
        workspace: Workspace,
        chunk: Chunk,
        terms: Terms,
        columns: Tensor | None,
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor | None]:
        """Both halves, where nothing has to meet between them: what `chunk_statistics` returns, and the gradients."""
