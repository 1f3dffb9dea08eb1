"""DTensors of a call as the tensors of this process, and the group that their vocabulary lies over."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import fail


def group_over(function: str, argument: str, head: Any, dim: int) -> Any:
    """The process group that a head's rows (dim 0), or the columns of logits (dim -1), lie over."""
    dim %= head.ndim
    over = [number for number, placement in enumerate(head.placements) if placement == Shard(dim)]
    rest = [placement for placement in head.placements if placement != Shard(dim)]
    if len(over) != 1 or any(not placement.is_replicate() for placement in rest):
        _refuse(function, argument, f"be [Shard({dim})] over one mesh dimension", head)
    return head.device_mesh.get_group(over[0])


def local(function: str, argument: str, value: Any, dim: int | None) -> Any:
    """The part of this process of a tensor that is divided along `dim`, None: of one that every process has whole, and
    whose gradient comes out whole. What is no DTensor is returned."""
    if not isinstance(value, DTensor):
        return value
    if dim is not None:
        group_over(function, argument, value, dim)
        return value.to_local()
    if any(not placement.is_replicate() for placement in value.placements):
        _refuse(function, argument, "be replicated, or a tensor of this process", value)
    found: Tensor = value.to_local(grad_placements=[Replicate()] * value.device_mesh.ndim)
    return found


def whole(part: Tensor, head: Any) -> Tensor:
    """[..., V] of the parts [..., V_i] that processes have by their rows of a head, a DTensor. No gradient flows."""
    shape = torch.Size((*part.shape[:-1], head.shape[0]))
    over = [Shard(part.ndim - 1) if placement.is_shard() else Replicate() for placement in head.placements]
    stride = torch.empty(shape, device="meta").stride()
    found = DTensor.from_local(part.detach(), head.device_mesh, over, run_check=False, shape=shape, stride=stride)
    out: Tensor = found.full_tensor()
    return out


def _refuse(function: str, argument: str, relation: str, value: Any) -> NoReturn:
    got = f"a DTensor {list(value.placements)}"
    fail(function, argument, relation, got, f"Pass {argument}.redistribute(placements=...)")
