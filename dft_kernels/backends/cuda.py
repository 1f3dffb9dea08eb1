"""The CUDA backend: the row operations of csrc/cuda, where the extension was built with nvcc."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import exponentials, extension
from .contract import Backward, Chunk, Statistics, Terms
from .exponentials import ExponentialWorkspace
from .kernels import KernelBackend, KernelOperations
from .rows import RowWorkspace


def _kernels() -> Any:
    return extension.CUDA


class CudaBackend(KernelBackend):
    """CUDA row kernels around torch's products.

    design: "generic" (rows.cu, any row), "lean" (lean.cu: a row is read once and kept in the registers of a cluster of
    blocks), or "automatic", the second wherever device, shape, alignment and what is asked for admit it; "exponential",
    where the head's product itself can leave the exponentials of a cross-entropy (exponentials.py), else automatic.
    """

    name = "cuda"

    def __init__(self, design: str = "automatic") -> None:
        self.exponential = design == "exponential"
        self.name = "cuda_exponential" if self.exponential else "cuda"
        self.operations = KernelOperations(_kernels, design="automatic" if self.exponential else design)

    def holds(self, terms: Terms, like: Tensor) -> torch.dtype:
        """Exponentials are held in the input dtype."""
        return like.dtype if self.exponential and exponentials.fit(terms, like) else super().holds(terms, like)

    def workspace(
        self, rows: int, vocab: int, like: Tensor, terms: Terms, gradient: bool, kept: int = 0
    ) -> RowWorkspace:
        """Memory for logits, or for exponentials."""
        if gradient and self.exponential and exponentials.fit(terms, like):
            return exponentials.workspace(rows, vocab, like, terms, kept)
        return super().workspace(rows, vocab, like, terms, gradient, kept)

    def chunk_step(
        self, workspace: RowWorkspace, chunk: Chunk, columns: Tensor | None, backward: Backward
    ) -> Statistics:
        """By the design that the workspace is of."""
        if isinstance(workspace, ExponentialWorkspace):
            return exponentials.step(workspace, chunk, backward, self.operations)
        return super().chunk_step(workspace, chunk, columns, backward)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Off an NVIDIA GPU, without the extension, on a GPU that it was not compiled for."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"its kernels run on NVIDIA GPUs, not on {'ROCm' if device.type == 'cuda' else device.type}"
        if extension.CUDA is None:
            return extension.CUDA_REASON
        if torch.compiler.is_compiling():
            return None
        return extension.not_compiled_for(torch.cuda.get_device_capability(device))
