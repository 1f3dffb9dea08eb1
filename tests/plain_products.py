"""What the kernels of triton_ops/active.py do, in plain PyTorch, on any device and in any dtype."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from dft_kernels.backends.active_device import DeviceColumns
from dft_kernels.backends.reference import ReferenceBackend
from dft_kernels.dtypes import accumulate_dtype


def _taken(order: Tensor, span: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Places of a span that stand for a column, and the columns."""
    places = torch.arange(*span.tolist())
    places = places[order[places] < vocab]
    return places, order[places]


def spread(dlogits: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    wide = dlogits.to(norms.dtype)
    return wide.square().sum(0), norms @ wide.abs()


def gather(dlogits: Tensor, order: Tensor, span: Tensor, columns: Tensor) -> None:
    places, taken = _taken(order, span, dlogits.shape[1])
    columns[:, slice(*span.tolist())] = 0.0
    columns[:, places] = dlogits[:, taken]


def add_dhidden(columns: Tensor, order: Tensor, span: Tensor, weight: Tensor, out: Tensor) -> None:
    places, taken = _taken(order, span, len(weight))
    out += columns[:, places].to(out.dtype) @ weight[taken].to(out.dtype)


def add_dweight(columns: Tensor, order: Tensor, span: Tensor, hidden: Tensor, out: Tensor) -> Tensor:
    wide = accumulate_dtype(hidden.dtype)
    places, taken = _taken(order, span, len(out))
    product, before = columns[:, places].t().to(wide) @ hidden.to(wide), out[taken].to(wide)
    out[taken] = (before + product).to(out.dtype)
    return (product * (2.0 * before + product)).sum(dtype=torch.float64)


class DeviceBackend(ReferenceBackend):
    """The reference backend, with columns chosen as on a GPU."""

    def active(self, error: float, weight: Tensor, rows: int) -> Any:
        return DeviceColumns(error, weight, rows, sys.modules[__name__])
