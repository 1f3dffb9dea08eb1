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
    group: Any = None  # the process group of such a vocabulary
    told: bool = False  # by a DTensor's mesh, and not by the caller

    @property
    def size(self) -> int:
        """The part of the vocabulary."""
        over, dim = (self.hidden, -1) if self.weight is None else (self.weight, 0)
        return over.shape[dim] if isinstance(over, Tensor) and over.ndim else 0


def parts(function: Function, hidden: Any, weight: Any, options: LossOptions) -> Parts:
    """The tensors of this process."""
    down, up = pair(function.name, options["low_rank"])
    group, bias = options["process_group"], options["bias"]
    told = hasattr(hidden if weight is None else weight, "placements")  # a DTensor
    if not told and group is None:
        return Parts(hidden, weight, bias, down, up)
    from ..distributed.dtensor import group_over, local  # torch's DTensor is imported where somebody has one

    names = function.names
    known: Any = None
    if function.projected:
        if told:
            known = group_over(function.name, names[1], weight, 0)
        hidden, weight, bias = (
            local(function.name, name, value, dim)
            for name, value, dim in zip(names, (hidden, weight, bias), (None, 0, 0), strict=True)
        )
        down, up = local(function.name, "low_rank", down, None), local(function.name, "low_rank", up, 0)
    else:
        if told:
            known = group_over(function.name, names[0], hidden, -1)
        hidden = local(function.name, names[0], hidden, -1)
    group = known if group is None else group_of(function.name, group)
    if known is not None and group != known:
        got = f"one of {group.size()} processes for a DTensor over {known.size()}"
        fail(function.name, "process_group", f"be that of {names[1] or names[0]}'s mesh", got, "Leave it out")
    return Parts(hidden, weight, bias, down, up, group, told)


def inputs(
    function: Function, tensors: Parts, shards: Shards | None, target: Any, options: LossOptions
) -> tuple[Checks, Fields]:
    """The checks of a call, made from its hidden states and head; and these, flattened to N rows."""
    hidden, weight, bias, down, up, group, _ = tensors
    if function.projected:
        hidden, weight, bias, down, up = autocast(hidden, weight, bias, down, up)
    check = Checks(function.name, function.names, hidden, shards)
    if function.projected:
        check_head(check, weight, bias, hidden, function.names, parted=group is not None)
        _check_low_rank(check, down, up, weight)
        check.vocab = weight.shape[0]
    else:
        check.vocab = hidden.shape[-1]
        if check.vocab == 0 and group is None:
            check.fail(
                function.names[0], "have at least one class (V >= 1)", list(hidden.shape), "Pass logits [..., V]"
            )
    if function.labelled:
        check.tensor("target", target)
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


def called(function: Function, problem: Any, teacher: Any, options: LossOptions, looks: bool) -> Called:
    """What the processes of a group have to agree in; looks: in their labels too."""
    plain = (bool, int, float, str, torch.dtype, type(None))
    kinds = {
        name: repr(value) if isinstance(value, plain) else type(value).__name__
        for name, value in options.items()
        if name != "process_group"
    }
    backend = backends.choose(problem.backend, problem.hidden.device, problem.hidden.dtype).name
    text = f"{function.name} {problem.hidden.dtype} {backend} {type(teacher).__name__} {sorted(kinds.items())}"
    labels, found = problem.target, 0
    if labels is not None and looks:
        places = torch.arange(1, labels.numel() + 1, device=labels.device)
        found = int((labels * places).sum()) & ((1 << 48) - 1)
    width = problem.hidden.shape[1] if function.projected else 0
    return Called(problem.hidden.shape[0], width, zlib.crc32(text.encode()), found)
