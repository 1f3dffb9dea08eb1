"""How much of a gradient is signal: the cosine between those of two halves of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def split_half(
    parameters: Iterable[Tensor],
    losses: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> float | None:
    """Run both losses, each with its backward pass, and return the cosine of their gradients: near 1 where the halves
    agree, 0 where what is added to `.grad` is noise. With n times the data it is about n c / (1 + (n - 1) c).

    parameters: leaves, without a gradient yet; where one has, as in the middle of accumulation, the losses are run and
    None is returned, as where a gradient is 0. No memory beyond the gradients; a dot product each.
    """
    known = [parameter for parameter in parameters if parameter.requires_grad]
    fresh = all(parameter.grad is None for parameter in known)
    sums: dict[str, list[Tensor]] = {"first": [], "second": [], "both": []}

    def seen(half: str, parameter: Tensor, gradient: Tensor) -> None:
        sums[half].append(gradient.float().square().sum())
        if half == "second" and parameter.grad is not None:
            sums["both"].append((gradient.float() * parameter.grad.float()).sum())

    for half, loss in zip(("first", "second"), losses, strict=True):
        handles = [one.register_hook(partial(seen, half, one)) for one in known] if fresh else []
        try:
            backward(loss())
        finally:
            for handle in handles:
                handle.remove()
    if not all(sums.values()):
        return None
    first, second, both = (float(torch.stack(values).double().sum()) for values in sums.values())
    return both / (first * second) ** 0.5 if first > 0 and second > 0 else None
