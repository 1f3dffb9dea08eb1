"""The backends and the choice between them. Imports of optional packages stay inside the backends."""

from __future__ import annotations

from typing import Any

import torch

from .contract import Backend
from .native import NativeBackend
from .reference import ReferenceBackend

# in the order of preference of "auto"
BACKENDS: dict[str, Any] = {"native": NativeBackend(), "reference": ReferenceBackend()}


def choose(name: str, device: torch.device) -> Backend:
    """The backend that "auto" or an available name stands for on `device`. `problem.py` has checked the name."""
    if name != "auto":
        return BACKENDS[name]
    return next(backend for backend in BACKENDS.values() if backend.unavailable(device) is None)
