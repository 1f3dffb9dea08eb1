"""DTensors of a call as the tensors of this process, and the group that their vocabulary lies over."""

from __future__ import annotations

from typing import Any, NoReturn

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
    mesh = head.device_mesh
    group, ranks = mesh.get_group(over[0]), mesh.mesh.movedim(over[0], -1).reshape(-1, mesh.size(over[0])).tolist()
    if any(line != sorted(line) for line in ranks):  # a group's ranks are sorted, its mesh's need not be
        fail(function, argument, "be over a mesh of ascending ranks", ranks, "Make the mesh of ranks in their order")
    return group


def local(function: str, argument: str, value: Any, dim: int | None, group: Any = None) -> Any:
    """The part of this process of a tensor that is divided along `dim` over `group`, None: of one that every process
    has whole, and whose gradient comes out whole. What is no DTensor is returned."""
    if not isinstance(value, DTensor):
        return value
    if dim is not None:
        if group_over(function, argument, value, dim) != group:
            _refuse(function, argument, "be divided over the processes that the head is", value)
        return value.to_local()
    if any(not placement.is_replicate() for placement in value.placements):
        _refuse(function, argument, "be replicated, or a tensor of this process", value)
    found: Tensor = value.to_local(grad_placements=[Replicate()] * value.device_mesh.ndim)
    return found


def _refuse(function: str, argument: str, relation: str, value: Any) -> NoReturn:
    got = f"a DTensor {list(value.placements)}"
    fail(function, argument, relation, got, f"Pass {argument}.redistribute(placements=...)")
