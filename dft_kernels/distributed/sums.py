"""Gradients of hidden states summed over processes, while the next chunk is computed.

Every process has a part of each row's gradient, rounded to the input dtype. The rows' numbers are divided among the
processes: each receives its share of every other's part, adds them in the order of ranks in the accumulation dtype,
rounds once, and sends the sum to all. It is an all-reduce in the input dtype by its volume, of
2 (n - 1) / n numbers that a process sends for one of dhidden, and one in the accumulation dtype by its rounding; all
processes get the same bits. Under sequence parallelism a process needs the sums of its own rows alone: one exchange of
the first kind, in the backward of `sequence.gather_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtypes import accumulate_dtype
from .shards import Shards, all_gather


def in_shares(parts: Tensor, group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """This process's share of everybody's `parts` [n, share], [n, share] in the order of ranks; and the exchange, where
    it is not waited for."""
    out = torch.empty_like(parts.view(-1))
    work = dist.all_to_all_single(out, parts.view(-1), group=group, async_op=async_op)
    return out.view(parts.shape), work


def summed(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in order, rounded once."""
    return parts.sum(0, dtype=accumulate_dtype(parts.dtype)).to(parts.dtype)


@dataclass
class _Sum:
    """A tensor on its way: `parts` [n, share] of everybody while `work` runs, then the sums `whole` [n share]."""

    into: Tensor
    work: Any
    parts: Tensor | None
    whole: Tensor | None = None


@dataclass
class Sums:
    """Sums over the processes of `shards`, each begun with a chunk, sent on with the next, complete with the one after
    that: of two chunks at a time there are copies."""

    shards: Shards
    running: list[_Sum] = field(default_factory=list)

    def begin(self, into: Tensor) -> None:
        """Sum `into` over the processes. Until `finish` returns it may hold anything, and nobody may write to it."""
        n = len(self.shards.sizes)
        if n == 1 or into.numel() == 0:
            return
        share = -(-into.numel() // n)
        flat = torch.nn.functional.pad(into.reshape(-1), (0, n * share - into.numel()))
        parts, work = in_shares(flat.view(n, share), self.shards.group, async_op=True)
        self.running.append(_Sum(into, work, parts))

    def advance(self) -> None:
        """Bring each a step further. After an exchange of the same group, which came later, nothing is waited for."""
        for sum_ in self.running:
            sum_.work.wait()
            if sum_.parts is not None:
                share, sum_.parts = summed(sum_.parts), None
                sum_.whole = share.new_empty(len(self.shards.sizes) * len(share))
                sum_.work = all_gather(sum_.whole, share, group=self.shards.group, async_op=True)
            elif sum_.whole is not None:
                sum_.into.copy_(sum_.whole[: sum_.into.numel()].view(sum_.into.shape))
                sum_.whole = None
        self.running = [sum_ for sum_ in self.running if sum_.parts is not None or sum_.whole is not None]

    def finish(self) -> None:
        """Wait for all that were begun."""
        while self.running:
            self.advance()
