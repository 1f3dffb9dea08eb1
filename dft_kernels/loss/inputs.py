"""Hidden states, head and low-rank pair of a call: shapes, dtypes, devices; and who else has parts of the head."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..distributed.shards import Called, Shards, group_of
from ..errors import fail
from .checks import Checks, Fields, flattened
from .options import Function, LossOptions


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as `F.linear` would under an active autocast of the tensors' device: all but fp64 to its dtype."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def pair(function: str, value: Any) -> tuple[Any, Any]:
    """What low_rank holds: two tensors, or nothing."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(part, Tensor) for part in value):
        remedy = "Pass (down, up), with down = hidden @ A.T"
        fail(function, "low_rank", "be two tensors (down [..., r], up [V, r])", type(value).__name__, remedy, TypeError)
    return value[0], value[1]


def check_head(
    check: Checks, weight: Any, bias: Any, hidden: Tensor, names: tuple[str, str, str], parted: bool
) -> None:
    """[V, H] and [V] that fit hidden [..., H] in shape, dtype and device. parted: of a part of the vocabulary, which
    may be empty."""
    check.tensor(names[1], weight)
    if weight.ndim != 2:
        check.fail(
            names[1],
            "be 2-D [V, H]",
            list(weight.shape),
            "K-dimensional losses are not served: fold the extra class dimensions into rows",
        )
    if weight.shape[0] == 0 and not parted:
        check.fail(names[1], "have at least one row (V >= 1)", list(weight.shape), "Pass the head [V, H]")
    if weight.shape[1] != hidden.shape[-1]:
        check.fail(
            names[1],
            f"have shape [V, {hidden.shape[-1]}] to fit {names[0]} {list(hidden.shape)}",
            list(weight.shape),
            f"Pass the head as [V, H], as nn.Linear keeps it, with the H of {names[0]}",
        )
    check.like(names[0], hidden, names[1], weight)
    if bias is not None:
        check.like(names[0], hidden, names[2], check.tensor(names[2], bias))
        check.shape(names[2], bias, (weight.shape[0],), f"V of {names[1]}")


def _check_low_rank(check: Checks, down: Any, up: Any, weight: Tensor) -> None:
    """[..., r] and [V, r] that fit hidden [..., H] and weight [V, H]."""
    if down is None:
        return
    if down.ndim == 0 or down.shape[-1] == 0:
        check.fail("low_rank's down", "have shape [..., r], r >= 1", list(down.shape), "Pass hidden @ A.T")
    check.shape("low_rank's down", down, (*check.lead, down.shape[-1]), f"{check.names[0]}'s leading shape, then r")
    check.shape("low_rank's up", up, (weight.shape[0], down.shape[-1]), f"V of {check.names[1]}, and down's r")
    check.like(check.names[0], check.hidden, "low_rank's down", down)
    check.like(check.names[0], check.hidden, "low_rank's up", up)


class Parts(NamedTuple):
    """Hidden states and head as a call gives them; of a vocabulary of several processes the parts of this one."""

    hidden: Any
    weight: Any
    bias: Any
    down: Any
    up: Any


def over_processes(function: Function, hidden: Any, weight: Any, options: LossOptions) -> tuple[Any, int]:
    """The process group that the vocabulary lies over, None: it does not; and how many ids this process has."""
    name, over, dim = (function.names[1], weight, 0) if function.projected else (function.names[0], hidden, -1)
    group = options["process_group"]
    known: Any = None
    if hasattr(over, "placements"):
        from ..distributed.dtensor import group_over  # torch's DTensor is imported where somebody has one

        known, over = group_over(function.name, name, over, dim), over.to_local()
    group = known if group is None else group_of(function.name, group)
    if known is not None and group != known:
        got = f"one of {group.size()} processes for a DTensor over {known.size()}"
        fail(function.name, "process_group", f"be that of {name}'s mesh", got, "Leave it out")
    return group, over.shape[dim] if isinstance(over, Tensor) and over.ndim else 0


def parts(function: Function, hidden: Any, weight: Any, options: LossOptions, group: Any) -> Parts:
    """The tensors of this process."""
    down, up = pair(function.name, options["low_rank"])
    found = Parts(hidden, weight, options["bias"], down, up)
    if group is None or not any(hasattr(tensor, "placements") for tensor in found):
        return found
    from ..distributed.dtensor import local

    if hasattr(hidden, "placements") and function.projected and not options["sum_hidden_gradient"]:
        remedy = "Pass hidden.to_local(), whose gradient is then a part of a sum"
        fail(function.name, function.names[0], "be no DTensor with sum_hidden_gradient=False", "one", remedy)
    names = (*function.names, "low_rank", "low_rank")
    dims = (None, 0, 0, None, 0) if function.projected else (-1, None, None, None, None)
    each = zip(names, found, dims, strict=True)
    return Parts(*(local(function.name, name, value, dim, group) for name, value, dim in each))


def inputs(
    function: Function, tensors: Parts, shards: Shards | None, target: Any, options: LossOptions
) -> tuple[Checks, Fields]:
    """The checks of a call, made from its hidden states and head; and these, flattened to N rows."""
    hidden, weight, bias, down, up = tensors
    parted = shards is not None
    if function.projected:
        hidden, weight, bias, down, up = autocast(hidden, weight, bias, down, up)
    check = Checks(function.name, function.names, hidden, shards)
    if function.projected:
        check_head(check, weight, bias, hidden, function.names, parted)
        _check_low_rank(check, down, up, weight)
        check.vocab = weight.shape[0]
    else:
        check.vocab = hidden.shape[-1]
        if check.vocab == 0 and not parted:
            check.fail(
                function.names[0], "have at least one class (V >= 1)", list(hidden.shape), "Pass logits [..., V]"
            )
    if not isinstance(target, Tensor) and (function.labelled or target is not None):
        remedy = "Pass a torch.Tensor; a teacher goes in as teacher="
        check.fail("target", "be a tensor of labels", type(target).__name__, remedy, TypeError)
    fields: Fields = {
        "sharded": 0 if shards is None else shards.handle,
        "sums_hidden": bool(options["sum_hidden_gradient"]),
        "hidden": flattened(hidden),
        "weight": weight,
        "bias": bias,
        "down": None if down is None else flattened(down),
        "up": up,
        "target": check.per_row("target", target, floating=False),
        "logit_scale": check.number(
            "logit_scale", options["logit_scale"], "be a number other than 0", lambda x: x != 0
        ),
        "softcap": None if options["softcap"] is None else check.positive("softcap", options["softcap"], " or None"),
    }
    return check, fields


_OVER_VOCAB = {  # fields of a Problem whose sizes differ between processes, and along which dimension
    **{"weight": 0, "bias": 0, "up": 0, "teacher_weight": 0, "teacher_bias": 0},
    **{"potential": 1, "features": 0, "feature_index": 1},
}


def called(function: Function, problem: Any, teacher: Any, looks: bool, told: bool) -> tuple[Called, str]:
    """What the processes of a group have to agree in, and the text that its options are the checksum of. looks: whether
    a device may be waited for; told: the group is that of a DTensor, which may be data parallel."""
    backend = backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype).name
    mixed = [getattr(teacher, name, None) for name in ("kind", "weights")]
    said = [function.name, f"backend={backend}", f"teacher={type(teacher).__name__} {mixed}"]
    for name, value in zip(problem._fields, problem, strict=True):
        if isinstance(value, Tensor):
            over = _OVER_VOCAB.get(name)
            if (name, problem.weight) == ("hidden", None) or (name, problem.teacher_weight) == ("teacher_hidden", None):
                over = 1
            sizes = ["V" if dim == over else size for dim, size in enumerate(value.shape)]
            said.append(f"{name}={value.dtype} {sizes}")
        elif name not in ("source", "sharded", "backend"):
            said.append(f"{name}={value!r}")
    text = "; ".join(said)
    labels = hidden = close = 0
    if looks:
        labels = sum(map(_checksum, (problem.target, problem.group, problem.top_indices))) & _MASK
    if told and problem.hidden.numel():  # nearly the same numbers, whatever the processes' kernels round
        row = problem.hidden.detach()[0].double().nan_to_num(0.0, 0.0, 0.0)
        hidden, close = int(1e6 * row.sum()), int(1e3 * row.abs().sum())
    width = problem.hidden.shape[1] if function.projected else 0
    return Called(problem.hidden.shape[0], width, zlib.crc32(text.encode()), labels, hidden, close), text


_MASK = (1 << 48) - 1


def _checksum(ids: Tensor | None) -> int:
    """Of ids and their places."""
    if ids is None:
        return 0
    mixed = (ids.reshape(-1) + 1) * 0x9E3779B97F4A7C1
    mixed = (mixed ^ (mixed >> 29)) * torch.arange(1, 2 * ids.numel() + 1, 2, device=ids.device)
    return int((mixed ^ (mixed >> 31)).sum())
