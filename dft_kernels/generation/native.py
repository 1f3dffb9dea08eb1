"""The steps' C++ kernels (csrc/cpu/scores.h), where they run: on a CPU, in fp32 or fp64, with the extension built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import extension

MODULE = extension.MODULE


def computed(kernel: str, scores: Tensor, *given: Any) -> Tensor | None:
    """Log-probabilities [B, V] by a kernel, of scores [B, V] and what it is given; None where it does not run, which is
    where gradients are asked for too. Cost: the result, and sweeps over each row while it is in the cache."""
    runs = MODULE is not None and scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64)
    if not runs or torch.compiler.is_compiling() or (scores.requires_grad and torch.is_grad_enabled()):
        return None
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    getattr(MODULE, kernel)(scores, *given, out)
    return out


def instruction_set(device: str) -> str:
    """Of the kernels, on which the last bits of a draw depend; "torch" where they do not run. device: its type."""
    return str(MODULE.instruction_set()) if MODULE is not None and device == "cpu" else "torch"
