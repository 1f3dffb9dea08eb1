"""The backends and the choice between them. Imports of optional packages stay inside the backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .contract import PartialBackend
from .cuda import CudaBackend
from .native import NativeBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

# in the order of preference of "auto"
BACKENDS: dict[str, PartialBackend[Any]] = {
    backend.name: backend for backend in (NativeBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
}


def fitting(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """The names that "auto" may choose from for inputs of `dtype` on `device`, best first."""
    for name, backend in BACKENDS.items():
        if device.type not in backend.emulated and backend.unavailable(device, dtype) is None:
            yield name


def choose(name: str, device: torch.device, dtype: torch.dtype) -> PartialBackend[Any]:
    """The backend that "auto" or an available name stands for. `problem.py` has checked the name."""
    return BACKENDS[next(fitting(device, dtype)) if name == "auto" else name]
