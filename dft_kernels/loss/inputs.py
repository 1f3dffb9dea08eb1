"""Hidden states, head and low-rank pair of a call: shapes, dtypes, devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def check_head(check: Checks, weight: Any, bias: Any, hidden: Tensor, names: tuple[str, str, str]) -> None:
    """[V, H] and [V] that fit hidden [..., H] in shape, dtype and device."""
    check.tensor(names[1], weight)
    if weight.ndim != 2:
        check.fail(
            names[1],
            "be 2-D [V, H]",
            list(weight.shape),
            "K-dimensional losses are not served: fold the extra class dimensions into rows",
        )
    if weight.shape[0] == 0:
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


def inputs(function: Function, hidden: Any, weight: Any, target: Any, options: LossOptions) -> tuple[Checks, Fields]:
    """The checks of a call, made from its hidden states and head; and these, flattened to N rows."""
    bias = options["bias"]
    down, up = pair(function.name, options["low_rank"])
    if function.projected:
        hidden, weight, bias, down, up = autocast(hidden, weight, bias, down, up)
    check = Checks(function.name, function.names, hidden)
    if function.projected:
        check_head(check, weight, bias, hidden, function.names)
        _check_low_rank(check, down, up, weight)
        check.vocab = weight.shape[0]
    else:
        check.vocab = hidden.shape[-1]
        if check.vocab == 0:
            check.fail(
                function.names[0], "have at least one class (V >= 1)", list(hidden.shape), "Pass logits [..., V]"
            )
    if function.labelled:
        check.tensor("target", target)
    fields: Fields = {
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
