"""The dtype that sums are kept in, and the layout of sparse matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sparse_matrix(index: Tensor, values: Tensor, shape: tuple[int, int], check: bool = True) -> Tensor:
    """A sparse COO matrix of values [nnz] at index [2, nnz]; check: that the indices lie in it."""
    with torch.sparse.check_sparse_tensor_invariants(check):  # torch 2.11 warns where this is not said globally
        return torch.sparse_coo_tensor(index, values, shape)
