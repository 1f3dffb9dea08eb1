"""The dtype that sums are kept in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
