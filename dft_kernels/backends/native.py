"""The native CPU backend: the chunk step in C++ (csrc/step_cpu.cpp), products and row work tile by tile.

Scratch: 4 bytes a logit of a chunk (8 for fp64), twice that with a teacher; the gradient is written over the
logits. It is kept between calls, until `release_scratch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..divergences import TABLE
from ..gemm import accumulate_dtype
from ..teachers import Head
from .contract import Chunk, Cotangents, Gradients, Row, Terms

_LANES = 32  # rows of a chunk are padded to this (csrc/rows_cpu.h)


@dataclass(frozen=True)
class NativeWorkspace:
    """The C++ step of one call; its scratch goes back to the pool with it."""

    rows: int
    step: Any


class NativeBackend:
    """C++ on the CPU, where the extension was built."""

    name = "native"
    best_rows = 512
    emulated: tuple[str, ...] = ()

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Off the CPU, or without the extension."""
        if device.type != "cpu":
            return f"its kernels are the CPU's, not {device.type}'s"
        return extension.REASON

    def chunk_bytes(self, dtype: torch.dtype, projected: bool, target: int) -> int:
        """Own logits and the teacher's in the accumulation dtype."""
        return accumulate_dtype(dtype).itemsize * (2 if target else 1)

    def workspace(self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool) -> NativeWorkspace:
        """Borrow scratch for `rows` rows and set up the step."""
        native, wide = extension.MODULE, accumulate_dtype(like.dtype)
        numbers = vocab * (-(-rows // _LANES) * _LANES)
        buffers = [extension.scratch([numbers], wide, like.device) for _ in range(2 if terms.taught else 1)]
        index: tuple[Tensor | None, ...] = (None, None, None)
        if terms.features is not None:
            sparse = terms.features.to_sparse_csr()
            index = (sparse.crow_indices().to(torch.int64), sparse.col_indices().to(torch.int64), sparse.values())
        step = native.CpuStep(
            model=_head(terms.head),
            vocab=vocab,
            wanted=_bits(terms.wanted),
            differentiated=_bits(terms.differentiated),
            differentiates=gradient,
            divergence=TABLE[terms.divergence.name].id,
            parameter=terms.divergence.parameter,
            temperature=terms.temperature,
            teacher_temperature=terms.teacher_temperature,
            potential=terms.potential,
            feature_rows=index[0],
            feature_columns=index[1],
            feature_entries=index[2],
            features=0 if terms.features is None else terms.features.shape[1],
            logits=buffers[0],
            target=buffers[1] if terms.taught else None,
        )
        return NativeWorkspace(rows, step)

    def chunk_statistics(
        self, workspace: NativeWorkspace, chunk: Chunk, terms: Terms, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Products and two sweeps; see the contract."""
        statistics, features = workspace.step.statistics(_chunk(chunk), columns)
        return statistics, None if terms.features is None else features

    def chunk_gradient(
        self,
        workspace: NativeWorkspace,
        chunk: Chunk,
        terms: Terms,
        statistics: Tensor,
        features: Tensor | None,
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> None:
        """One sweep and products; see the contract."""
        workspace.step.gradient(
            _chunk(chunk),
            statistics,
            statistics if features is None else features,
            cotangents.settled(statistics),
            cotangents.features,
            gradients.dhidden,
            gradients.dweight,
            gradients.dbias,
            gradients.first,
        )

    def chunk_step(
        self,
        workspace: NativeWorkspace,
        chunk: Chunk,
        terms: Terms,
        columns: Tensor | None,
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor | None]:
        """One half after the other: a chunk's logits do not stay in the cache between them."""
        statistics, features = self.chunk_statistics(workspace, chunk, terms, columns)
        self.chunk_gradient(workspace, chunk, terms, statistics, features, cotangents, gradients)
        return statistics, features


def _bits(rows: frozenset[Row]) -> int:
    return sum(1 << row for row in rows)


def _head(head: Head) -> Any:
    return extension.MODULE.Head(head.weight, head.bias, head.logit_scale, head.softcap or 0.0)


def _chunk(chunk: Chunk) -> Any:
    target, head = chunk.target or (None, Head())
    return extension.MODULE.Chunk(chunk.hidden, chunk.label, chunk.group, chunk.weight, target, _head(head))
