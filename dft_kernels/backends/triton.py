"""The Triton backend: the row operations of `triton_ops`, on any GPU that Triton reaches.

Without a GPU the same kernels run under Triton's interpreter (TRITON_INTERPRET=1): slowly, for tests.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from .kernels import OLDEST, TRITON, KernelBackend, KernelOperations, too_old

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as triton reads it


def _kernels() -> Any:
    import triton_ops  # imports triton, which `import dft_kernels` does not

    return triton_ops


class TritonBackend(KernelBackend):
    """Triton row kernels around torch's products."""

    name = "triton"
    emulated = ("cpu",)
    operations = KernelOperations(_kernels)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Without triton, off the GPU, on a GPU too old for it, for fp64."""
        if not TRITON:
            return "triton is not installed (pip install triton)"
        if device.type == "cpu" and not _INTERPRETED:
            return (
                "its kernels run on a GPU; on the CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests"
            )
        if device.type not in ("cpu", "cuda"):
            return f"its kernels run on CUDA and ROCm devices, not on {device.type}"
        if dtype == torch.float64:
            return "its kernels compute in float32"
        if not torch.compiler.is_compiling() and too_old(device):
            needed, own = f"{OLDEST[0]}.{OLDEST[1]}", torch.cuda.get_device_capability(device)
            return f"Triton needs compute capability {needed}, this GPU has {own}"
        return None
