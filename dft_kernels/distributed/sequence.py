"""Sequences whose positions lie over several processes: their labels, how many count, and all of their rows.

Under context parallelism every process has the whole head and computes the loss of its own positions. Labels are those
of the next position, which may be another's, and a mean is over the tokens of all:

    labels = shift_labels(labels, group)
    loss = linear_distribution_loss(hidden, weight, labels, num_items=count_labels(labels, group))

whose sum over the group is the loss of the sequence. Where gradients are then averaged over the group, as DDP and FSDP
do, multiply the loss by its size.

Under sequence parallelism the head is divided too (`process_group`), and needs all rows, of which every process wants
the gradients of its own:

    hidden = gather_rows(hidden, group)
    loss = linear_distribution_loss(hidden, weight, labels, process_group=group, sum_hidden_gradient=False)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import fail
from .shards import gathered, group_of, same_shape
from .sums import in_shares, summed


def shift_labels(labels: Tensor, group: Any, ignore_index: int = -100) -> Tensor:
    """Next-token labels [..., T_i] of this process's consecutive part [..., T_i] of sequences, T_i >= 1 of any size,
    parts in the order of ranks: out[..., t] = labels[..., t + 1], the last the first label of the next process. The
    last position of all gets ignore_index. One exchange of a label a sequence."""
    group = group_of("shift_labels", group)
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.shape[-1] == 0:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        remedy = "Divide sequences into parts of at least one position"
        fail("shift_labels", "labels", "be a tensor [..., T] with T >= 1", got, remedy)
    same_shape("shift_labels", "labels[..., 0]", labels[..., 0], group)
    firsts = gathered(labels[..., 0], group)
    following = dist.get_rank(group) + 1
    last = firsts[following] if following < len(firsts) else torch.full_like(firsts[0], ignore_index)
    return torch.cat([labels[..., 1:], last[..., None]], dim=-1)


def count_labels(labels: Tensor, group: Any, ignore_index: int = -100) -> Tensor:
    """How many labels of all processes are not ignore_index, at least 1: num_items of a mean over all of them, 0-d."""
    count = (labels != ignore_index).sum()
    dist.all_reduce(count, group=group_of("count_labels", group))
    return count.clamp_min(1)


def gather_rows(tensor: Tensor, group: Any, dim: int = 0) -> Tensor:
    """The parts [.., T_i, ..] along `dim` of all processes, of one size, in the order of ranks: [.., n T_i, ..].

    Its gradient in each process is taken to be one of n parts whose sum is the gradient, as the loss leaves that of
    hidden states with sum_hidden_gradient=False: of each row they are sent to the process that the row came from, added
    there in the order of ranks in fp32 (fp64 for fp64), and rounded once. A process sends and receives (n - 1) / n of
    the result, forward and backward.
    """
    group = group_of("gather_rows", group)
    if not -tensor.ndim <= dim < tensor.ndim:
        fail("gather_rows", "dim", f"be a dimension of {list(tensor.shape)}", dim, "Pass that of the positions")
    same_shape("gather_rows", "tensor", tensor, group)
    return _Gathered.apply(tensor, group, dim % tensor.ndim)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, dim: int) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(tensor, group).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = grad.unflatten(ctx.dim, (dist.get_world_size(ctx.group), -1)).movedim(ctx.dim, 0).contiguous()
        return summed(in_shares(parts, ctx.group)[0]), None, None
