"""Of a loss and its gradients with their exact values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dft_kernels.testing import relative_error


def close(ours: Iterable[Tensor], exact: Iterable[Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= tolerance
