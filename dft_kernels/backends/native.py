"""The native CPU backend: the chunk step in C++ (csrc/cpu/step.cpp), products and row work tile by tile.

Scratch: 4 bytes a logit of a chunk (8 for fp64), twice that with a teacher. With `logits_dtype` of 16 bits: 2 a logit,
and 2 more for a teacher's head or logits given in 16 bits, else 4; beside these, for the model and for the teacher, a
tile in fp32 (64 rows of the vocabulary) a thread and, where ATen multiplies (fp16; bf16 without AVX512-BF16), a block
in fp32 (2048 rows). The gradient is written over the logits or that block. Scratch is kept between calls, until
`release_scratch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..divergences import TABLE
from ..dtypes import accumulate_dtype
from ..teachers.contract import DenseTarget, Head, SparseTarget
from . import extension, sparse
from .active import ActiveColumns, Spread, reach
from .contract import Backward, Chunk, Cotangents, PartialBackend, Row, Statistics, Terms, bits
from .gemm import tiles

_LANES = 32  # rows of a chunk are padded to this (csrc/cpu/rows.h)


@dataclass
class NativeWorkspace:
    """The C++ step of one call; its scratch returns to the pool when it is freed."""

    rows: int
    vocab: int
    terms: Terms
    step: Any
    chunk: Chunk | None = None  # the last one, and the same for the C++ step
    given: Any = None

    def of(self, chunk: Chunk) -> Any:
        """The chunk as the C++ step takes it, for both halves."""
        if chunk is not self.chunk:
            self.chunk, self.given = chunk, _chunk(chunk)
        return self.given


class NativeBackend(PartialBackend[NativeWorkspace]):
    """C++ on the CPU, where the extension was built."""

    name = "native"
    best_rows = 512
    even_rows = 32

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Off the CPU, or without the extension."""
        if device.type != "cpu":
            return f"its kernels are the CPU's, not {device.type}'s"
        return extension.REASON

    def chunk_bytes(self, logits: torch.dtype, projected: bool, target: int) -> int:
        """The model's logits, and the teacher's if there is one."""
        wide = accumulate_dtype(logits).itemsize
        theirs = min(target, wide) if logits.itemsize < wide else wide
        return logits.itemsize + (theirs if target else 0)

    def workspace(
        self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool, kept: int = 0
    ) -> NativeWorkspace:
        """Borrow scratch for `rows` rows and set up the step."""
        native, numbers = extension.MODULE, vocab * (-(-rows // _LANES) * _LANES)
        logits = extension.scratch([numbers], terms.logits_dtype, like.device)
        target = None
        if (held := _held(terms)) is not None:
            target = extension.scratch([numbers], held, like.device)
        index: tuple[Tensor | None, ...] = (None, None, None)
        if terms.features is not None:
            index = _compressed(terms.features)
        step = native.CpuStep(  # by place: keywords cost host time
            _head(terms.head),
            terms.up,
            vocab,
            bits(terms.wanted),
            bits(terms.differentiated),
            gradient,  # whether it differentiates
            TABLE[terms.divergence.name].id,
            terms.divergence.parameter,
            terms.temperature,
            terms.teacher_temperature,
            terms.potential,
            *index,  # rows, columns and entries of the features
            0 if terms.features is None else terms.features.shape[1],
            logits,
            target,
            terms.active and terms.target_dtype is not None,
        )
        return NativeWorkspace(rows, vocab, terms, step)

    def chunk_statistics(self, workspace: NativeWorkspace, chunk: Chunk, columns: Tensor | None) -> Statistics:
        """Products and two sweeps."""
        terms = workspace.terms
        statistics, features, found, tail = workspace.step.statistics(workspace.of(chunk), columns)
        outcomes = None
        if isinstance(chunk.target, SparseTarget) and terms.compared:
            outcomes = sparse.complete_(statistics, chunk.target, found, (tail[0], tail[1]), terms)
        return Statistics(statistics, None if terms.features is None else features, outcomes)

    def chunk_sums(self, workspace: NativeWorkspace, chunk: Chunk, found: Statistics, columns: Tensor | None) -> None:
        """One sweep."""
        workspace.step.sums(workspace.of(chunk), found.rows, columns)

    def chunk_gradient(self, workspace: NativeWorkspace, chunk: Chunk, found: Statistics, backward: Backward) -> None:
        """One sweep and products."""
        _gradient(workspace, chunk, found, backward, columns=None)

    def chunk_step(
        self, workspace: NativeWorkspace, chunk: Chunk, columns: Tensor | None, backward: Backward
    ) -> Statistics:
        """One half after the other: a chunk's logits do not stay in the cache between them. Column sums are taken in
        the gradient's sweep, which has every q at hand, unless a sparse target's tokens are left out of it."""
        cotangents = backward.cotangents
        if isinstance(chunk.target, SparseTarget):
            return super().chunk_step(workspace, chunk, columns, backward)
        if cotangents.lse_slope is not None or (backward.active is not None and backward.active.pays):
            found = self.chunk_statistics(workspace, chunk, None)
            _gradient(workspace, chunk, found, backward, columns)
            return found
        statistics, features, *_ = workspace.step.both(
            _chunk(chunk),
            cotangents.rows,
            cotangents.features,
            *_results(backward),
            columns,
        )
        return Statistics(statistics, None if workspace.terms.features is None else features)


def _gradient(
    workspace: NativeWorkspace, chunk: Chunk, found: Statistics, backward: Backward, columns: Tensor | None
) -> None:
    """The second half. columns: the column sums, where the first half has not added to them."""
    terms, cotangents, at = workspace.terms, backward.cotangents, None
    settled = cotangents.settled(found.rows)
    if isinstance(chunk.target, SparseTarget) and Row.DIVERGENCE in terms.differentiated:
        assert found.outcomes is not None
        index, pull = chunk.target.index, _pull(chunk.target.index, terms, found.features, cotangents)
        vocab = terms.head.weight.shape[0] if terms.head.weight is not None else chunk.hidden.shape[1]
        at = sparse.gradient_at(found.outcomes, index, chunk, terms, found.rows, settled, vocab, pull)
    given, step, active, spread = workspace.of(chunk), workspace.step, backward.active, None
    products = backward.dhidden is not None or backward.dweight is not None
    if active is not None and active.pays and products and step.keeps_dlogits(given):
        spread = Spread(*found.rows.new_empty(2, workspace.vocab))
    step.gradient(
        given,
        found.rows,
        found.rows if found.features is None else found.features,
        settled,
        cotangents.features,
        at,
        *_results(backward),
        columns,
        None if spread is None else extension.MODULE.Spread(reach(chunk.hidden), *spread),
    )
    if not isinstance(active, ActiveColumns) or spread is None:
        return
    dhidden, dweight, first = backward.dhidden, backward.dweight, backward.first
    target, likeliest = chunk.target, None
    if target is not None:
        likeliest = step.favourites() if isinstance(target, DenseTarget) else target.best()
    dlogits, add = step.dlogits(given).t(), extension.MODULE.add_products
    if not active.products(dlogits, chunk.hidden, (chunk.label, likeliest), dhidden, dweight, first, spread, add):
        step.products(given, dhidden, dweight, first)


def _results(backward: Backward) -> tuple[Any, ...]:
    """Where gradients go, and whether they are written or added to, as the C++ step takes them."""
    return backward.dhidden, backward.dweight, backward.dbias, backward.ddown, backward.dup, backward.first


def _held(terms: Terms) -> torch.dtype | None:
    """The dtype that the target's logits are held in: 16 bits where the model's are, and nothing is lost."""
    given, wide = terms.target_dtype, accumulate_dtype(terms.logits_dtype)
    if given is None:
        return None
    return given if terms.logits_dtype != wide and given.itemsize < wide.itemsize else wide


def _head(head: Head) -> Any:
    return extension.MODULE.Head(head.weight, head.bias, head.logit_scale, head.softcap or 0.0)


def _chunk(chunk: Chunk) -> Any:
    target = head = index = best = None
    if isinstance(chunk.target, SparseTarget):
        index, best = chunk.target.index, chunk.target.best()
    elif chunk.target is not None:
        target, head = chunk.target.hidden, _head(chunk.target.head)
    native = extension.MODULE
    return native.Chunk(chunk.hidden, chunk.label, chunk.group, chunk.weight, target, head, index, best, chunk.down)


def _compressed(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows of features [V, K] start, their columns, their entries (`to_sparse_csr` warns: beta)."""
    entries = features.to_sparse_coo().coalesce()
    row, column = entries.indices()
    counts = torch.bincount(row, minlength=features.shape[0])
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), column.contiguous(), entries.values()


def _pull(index: Tensor, terms: Terms, features: Tensor | None, cotangents: Cotangents) -> Tensor | None:
    """The factor of q that features contribute at `index` [R, k]: sum_j kappa_j (phi_j - <q, phi_j>)."""
    kappa = cotangents.features
    if features is None or kappa is None or terms.features is None:
        return None
    out = features.new_empty(index.shape)
    for rows in tiles(kappa, vocab=terms.features.shape[0]):
        potential = (terms.features @ kappa[rows].t()).t()  # [r, V]
        out[rows] = potential.gather(1, index[rows].clamp_min(0)) - (kappa[rows] * features[rows]).sum(-1, keepdim=True)
    return out
