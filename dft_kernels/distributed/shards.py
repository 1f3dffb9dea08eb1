"""How a vocabulary is divided over the processes of a group."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import fail

R = TypeVar("R")
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


@dataclass(frozen=True)
class Shards:
    """Consecutive parts of a vocabulary, one a process of `group`, in the order of their ranks."""

    group: Any
    sizes: tuple[int, ...]
    rank: int
    handle: int = field(default_factory=itertools.count(1).__next__, compare=False)

    @property
    def start(self) -> int:
        """The first id of this process."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """How many ids this process has."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """V"""
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        """The most ids that a process has."""
        return max(self.sizes)

    @property
    def checksum(self) -> int:
        """Of the sizes."""
        return zlib.crc32(repr(self.sizes).encode())

    def own(self, ids: Tensor) -> Tensor:
        """Where ids are this process's."""
        return (ids >= self.start) & (ids < self.start + self.size)

    def owner(self, ids: Tensor) -> Tensor:
        """The rank that has each id; of one outside the vocabulary, any."""
        return torch.bucketize(ids, _ends(self.sizes, ids.device), right=True)

    def gathered(self, mine: Tensor) -> Tensor:
        """`mine`, of the same shape everywhere, of every process: [n, *mine.shape]."""
        return gathered(mine, self.group)

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """logsumexp over the whole vocabulary of logits [R, size], [R, 1]."""
        return self.gathered(logits.logsumexp(-1, keepdim=True)).logsumexp(0)


@functools.cache
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each part but the last ends, on `device`, copied there once."""
    return torch.tensor(list(itertools.accumulate(sizes[:-1])), dtype=torch.int64, device=device)


class Called(NamedTuple):
    """What every process of a group must call with alike."""

    rows: int  # N
    width: int  # H
    options: int  # a checksum of all other arguments, `text`
    labels: int  # a checksum of labels, groups and ids of a teacher; 0 where they are not looked at
    hidden: int = 0  # a number of the hidden states, for a DTensor's group, which may be data parallel
    hidden_size: int = 0  # by how little that is the same


_MEANING = {
    "rows": ("the same rows", "Every process passes all rows of hidden, and its own rows of weight"),
    "width": ("hidden states of one width", "Pass the same hidden states everywhere"),
    "options": ("the same arguments", "Compare the calls"),
    "labels": (
        "the same labels, groups and ids of a teacher",
        "Every process passes the whole target; a head that FSDP divides is read inside of forward, where it is whole",
    ),
}
_NOTHING = Called(0, 0, 0, 0)
_SIZES, _CALL, _FAILED = range(3)  # what a process says in an exchange: its size alone, its call, or that it has none
_known: dict[tuple[Any, int], Shards] = {}  # by group and this process's size, as they were last
_divisions: dict[Any, dict[tuple[int, ...], Shards]] = {}  # by group and all sizes
_agreed: set[tuple[int, Called]] = set()  # calls that are not looked at again
_by_handle: dict[int, Shards] = {}


def shards_of(handle: int) -> Shards:
    """The shards of this handle."""
    return _by_handle[handle]


def group_of(function: str, given: Any) -> Any:
    """The process group of a call's `process_group`, of which this process must be a member."""

    def refuse(relation: str, got: object, remedy: str, kind: type[Exception] = ValueError) -> NoReturn:
        fail(function, "process_group", relation, got, remedy, kind)

    if not (dist.is_available() and dist.is_initialized()):
        refuse("come after torch.distributed is initialised", "none", "Call torch.distributed.init_process_group first")
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            refuse("be one dimension of a mesh", f"{given.ndim} dimensions", 'Pass mesh["tp"]')
        given = given.get_group()
    if not isinstance(given, dist.ProcessGroup):
        refuse("be a ProcessGroup or a DeviceMesh of one dimension", type(given).__name__, "Pass one", TypeError)
    if dist.get_rank(given) < 0:
        refuse("have this process as a member", f"rank {dist.get_rank()} outside of it", "Call in its ranks alone")
    return given


def gathered(mine: Tensor, group: Any) -> Tensor:
    """`mine`, of the same shape everywhere, of every process of a group: [n, *mine.shape]."""
    count = dist.get_world_size(group)
    out = mine.new_empty(count * mine.numel())
    all_gather(out, mine.reshape(-1), group=group)
    return out.view(count, *mine.shape)


def together(part: Tensor, group: Any) -> Tensor:
    """[..., V] of the parts [..., V_i] of a group's processes, in the order of their ranks."""
    size = torch.tensor([part.shape[-1]], device=_device(group))
    sizes = gathered(size, group)[:, 0].tolist()
    padded = torch.nn.functional.pad(part, (0, max(sizes) - part.shape[-1]))
    return torch.cat([one[..., :n] for one, n in zip(gathered(padded, group), sizes, strict=True)], dim=-1)


def same_shape(function: str, argument: str, tensor: Tensor, group: Any) -> None:
    """Refuse tensors of other shapes or dtypes in other processes, in all of them. Not where that would wait for a
    device."""
    if _device(group).type != "cpu":
        return
    mine = f"{list(tensor.shape)} {tensor.dtype}"
    if len(set(gathered(torch.tensor([zlib.crc32(mine.encode())]), group)[:, 0].tolist())) > 1:
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
        remedy = "Divide sequences into parts of one size"
        fail(function, argument, "have one shape and dtype in all processes", every, remedy)


def agree(
    function: str, argument: str, group: Any, size: int, make: Callable[[Shards], tuple[R, Called, str, bool]]
) -> R:
    """What `make` returns for the shards of `group`, of which this process has `size` ids of `argument`, once all
    processes have made the same call; ValueError in every process where they have not, or where one has failed.

    make: shards -> a result, what the processes must call with alike, what its `options` is the checksum of, and
    whether a device is waited for to look at values. One small exchange a call, which the host waits for, and one more
    where a process does not know the others' sizes. Where no device is to be waited for, and the group has nothing to
    exchange numbers with but the device, only the first call of a kind makes one, as long as the group has seen one
    division of a vocabulary.
    """
    shards, fresh = _known.get((group, size)), False
    while True:
        if shards is None:
            shards, fresh = _told(function, argument, group, _exchange(group, _SIZES, size)), True
        try:
            result, called, text, looks = make(shards)
        except Exception:
            if fresh:
                _exchange(group, _FAILED, size)
                raise
            shards = None  # another head may have been divided so that this process's part is of the same size
            continue
        waits = looks or _device(group).type == "cpu" or len(_divisions[group]) > 1
        if not waits and (shards.handle, called) in _agreed:
            return result
        every = _exchange(group, _CALL, size, shards, called)
        shards, fresh = _told(function, argument, group, every), True
        if all(one[0] == _CALL and one[2] == shards.checksum for one in every):
            break
    _compare(function, group, [Called(*one[3:]) for one in every], text)
    if not waits:
        _agreed.add((shards.handle, called))
    return result


def _compare(function: str, group: Any, calls: list[Called], text: str) -> None:
    """Refuse calls that differ, in every process alike."""

    def refuse(name: str, relation: str, values: Sequence[Any], remedy: str) -> None:
        other = next(rank for rank, value in enumerate(values) if value != values[0])
        got = f"{values[0]} in rank 0 and {values[other]} in rank {other}"
        fail(function, name, f"be called with {relation} in all of its processes", got, remedy)

    for name, (relation, remedy) in _MEANING.items():
        values: list[Any] = [getattr(one, name) for one in calls]
        if len(set(values)) == 1:
            continue
        if name == "options":
            dist.all_gather_object(values, text, group=group)
            each = zip(*(one.split("; ") for one in values), strict=False)
            values = next(list(some) for some in each if len(set(some)) > 1)
        refuse("process_group", relation, values, remedy)
    hidden = [one.hidden for one in calls]
    if max(hidden) - min(hidden) > max(one.hidden_size for one in calls):
        remedy = "A head that FSDP divides is read inside of forward, where it is whole"
        refuse("process_group", "the same hidden states", hidden, remedy)


def _exchange(
    group: Any, kind: int, size: int, shards: Shards | None = None, called: Called = _NOTHING
) -> list[list[int]]:
    """Of every process: kind, size, a checksum of the sizes that it assumes, and its call."""
    assumed = 0 if shards is None else shards.checksum
    numbers = torch.tensor([kind, size, assumed, *called], device=_device(group))
    found: list[list[int]] = gathered(numbers, group).tolist()
    return found


def _told(function: str, argument: str, group: Any, every: list[list[int]]) -> Shards:
    """The shards of the sizes that all have said."""
    failed = [rank for rank, one in enumerate(every) if one[0] == _FAILED]
    if failed:
        got = f"an error in rank {failed[0]}"
        relation = "be called without error in all of its processes"
        fail(function, "process_group", relation, got, "See what it says there")
    sizes = tuple(one[1] for one in every)
    if sum(sizes) == 0:
        relation, remedy = "have a part of the vocabulary in one process at least", "Pass parts [V_i, ...] of it"
        fail(function, argument, relation, "none in any", remedy)
    divisions, rank = _divisions.setdefault(group, {}), dist.get_rank(group)
    if sizes not in divisions:
        divisions[sizes] = Shards(group, sizes, rank)
        _by_handle[divisions[sizes].handle] = divisions[sizes]
    found = _known[group, sizes[rank]] = divisions[sizes]
    return found


@functools.cache
def _device(group: Any) -> torch.device:
    """Where a group can exchange a few numbers: on the CPU if it has a backend for it."""
    return torch.device("cpu" if "cpu" in dist.get_backend_config(group) else torch.cuda.current_device())
