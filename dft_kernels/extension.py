"""The compiled room: whether `dft_kernels._C` is there, fits the running torch, and if not, why."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAMP = Path(__file__).with_name("_build.json")
_LARGE = 1 << 20  # bytes
REBUILD = "Rebuild with: pip install --no-build-isolation -e ."


def read_stamp(path: Path = STAMP) -> dict[str, Any] | None:
    """What setup.py wrote about its build: torch, cuda, built, reason. None where it never ran."""
    try:
        stamp = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def mismatch(stamp: dict[str, Any] | None) -> str | None:
    """Why an extension with this stamp must not be loaded into the running torch, None if it may be."""
    if stamp is None:
        return f"the C++ extension was never built. {REBUILD}"
    if not stamp.get("built"):
        return f"the C++ extension could not be built ({stamp.get('reason')}). Install a C++ compiler. {REBUILD}"
    if stamp.get("torch") != torch.__version__ or stamp.get("cuda") != torch.version.cuda:
        return (
            f"the C++ extension was built for torch {stamp.get('torch')} (CUDA {stamp.get('cuda')}), this is torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}). {REBUILD}"
        )
    return None


def load() -> tuple[Any, str | None]:
    """The extension module and None, or None and the reason. A stamp that does not fit is also warned about."""
    stamp = read_stamp()
    reason = mismatch(stamp)
    if reason is None:
        try:
            return importlib.import_module("dft_kernels._C"), None
        except ImportError as error:
            reason = f"the C++ extension does not load ({error}). {REBUILD}"
    if stamp is not None and stamp.get("built"):
        warnings.warn(f"dft_kernels: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


MODULE, REASON = load()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor for a large result. On a CPU its memory is kept for the next call when the tensor is
    gone, until `release_scratch`: touching fresh memory costs as much as a sweep over it."""
    if MODULE is None or device.type != "cpu" or math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return MODULE.pooled(list(shape), dtype)


def release_scratch() -> int:
    """Give the scratch that the CPU kernels keep between calls back to the system; returns its bytes.

    Kept are the logits of a chunk (4 bytes each, 8 with a teacher), dweight's fp32 accumulator [V, H] once its graph
    is gone, and the gradients that backward returned once nobody refers to them; what a tensor holds is left alone.
    """
    return 0 if MODULE is None else MODULE.release_pool()
