"""The CUDA backend: the row operations of csrc/cuda, where the extension was built with nvcc."""

from __future__ import annotations

from typing import Any

import torch

from . import extension
from .kernels import KernelBackend, KernelOperations


def _kernels() -> Any:
    return extension.CUDA


class CudaBackend(KernelBackend):
    """CUDA row kernels around torch's products.

    design: "generic" (rows.cu, any row), "lean" (lean.cu: a row is read once and kept in the registers of a cluster of
    blocks), or "automatic", the second wherever device, shape, alignment and what is asked for admit it.
    """

    name = "cuda"

    def __init__(self, design: str = "automatic") -> None:
        self.operations = KernelOperations(_kernels, design=design)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Off an NVIDIA GPU, without the extension, on a GPU that it was not compiled for."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"its kernels run on NVIDIA GPUs, not on {'ROCm' if device.type == 'cuda' else device.type}"
        if extension.CUDA is None:
            return extension.CUDA_REASON
        if torch.compiler.is_compiling():
            return None
        return extension.not_compiled_for(torch.cuda.get_device_capability(device))
