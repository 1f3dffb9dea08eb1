"""Which weight a term needs: how hard it pulls beside how hard cross-entropy holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..loss.functional import linear_distribution_statistics
from .base import TermSum
from .constraint import AtMost
from .pull import STATISTICS, Potentials, checked, filled, pull, slopes, wide

_CHUNK = 64  # rows whose logits are held at a time


@torch.no_grad()
def gains(
    term: Any,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    **loss: Any,
) -> dict[str, float]:
    """How hard each term pulls at a weight of 1, in units of how hard cross-entropy holds: g = V / (2 J), by name.

    A term moves logits along its own potential P, z_n - s P_n. There

        J(s) = J - s V + ...,    CE(s) = CE + s² V / 2 + ... (of a calibrated model),    V = mean_n Var_{q_n}(P_n)

    the square of P's length in the softmax's Fisher metric. A J that falls to 0 as a parabola does so at s = 2 J / V,
    where its curvature is V² / (2 J) and cross-entropy's V. So CE + w J is least w g / (1 + w g) of the way to the
    target, and **a weight of x / g asks for x / (1 + x) of it**. J's units do not matter. Terms of one direction (rates
    and gaps of the same marks) add up. A model that follows means which are late (`Delayed`) swings about its target
    where x is large, the more the faster it learns: in a linear model of that, with Adam's momentum and means that look
    back on equally many steps, it settles where the x of all terms together is below 1, at a low learning rate above.

    Of kinds whose pull does not fade (‖f - t‖, Wasserstein-1) g rises as J falls; take their squares (`squared=True`,
    distance="cramer"), or it holds for the gap at hand alone. 0 where nothing pulls.

    The arguments are `Delayed.loss`'s; pass a few thousand rows of the text to be trained on: J's noise counts as J.
    The weights of a sum do not count; an `AtMost` is its term. Cost: a pass of statistics, then logits [64, V] at a
    time in plain PyTorch. Raises what `exact` does.
    """
    terms, rows = checked("gains", term, hidden, weight, target, input_ids, loss)
    terms = TermSum([(1.0, part.term if isinstance(part, AtMost) else part) for _, part in terms.parts])
    asked = {name: loss[name] for name in STATISTICS if name in loss}
    found = linear_distribution_statistics(hidden, weight, target, features=terms.features, **asked)
    rows = replace(rows, columns=rows.weight.sum() * found.mean_probability[0].double())
    (seen,) = filled(terms, [rows], found.features, found.entropy, found.log_prob, rows.weight.shape)
    alone, pulls, values, first = [], [], [], 0
    for _, part in terms.parts:
        last = first + (0 if part.features is None else part.features.shape[1])
        own = seen if seen.features is None else replace(seen, features=seen.features[..., first:last])
        one, first = TermSum([(1.0, part)]), last
        of = slopes(one, one.gathered(own))
        alone.append(one)
        pulls.append(pull(one, of, own))
        values.append(float(of.values[0]))
    spread = torch.zeros(len(pulls), dtype=torch.float64, device=hidden.device)
    states, by = hidden.detach().reshape(-1, hidden.shape[-1]), rows.weight.reshape(-1)
    for at in by.nonzero()[:, 0].split(_CHUNK):
        log_q = _logits(states[at], weight, at, loss).log_softmax(-1)
        q = log_q.exp()
        for number, (one, each) in enumerate(zip(alone, pulls, strict=True)):
            p = _potential(one, each, at, log_q)
            p = p - (q * p).sum(-1, keepdim=True)
            spread[number] += (by[at] * (q * p.square()).sum(-1)).sum()
    total = by.sum()
    variance = (spread / torch.where(total == 0, 1.0, total)).tolist()
    names = zip(terms.names, variance, values, strict=True)
    return {name: v / (2 * value) if v > 0 and value > 0 else 0.0 for name, v, value in names}


def _logits(hidden: Tensor, weight: Tensor, at: Tensor, loss: dict[str, Any]) -> Tensor:
    """Of rows `at`, [R, V]."""
    z = torch.nn.functional.linear(hidden, weight.detach(), loss.get("bias")).to(wide(hidden))
    if loss.get("low_rank") is not None:
        down, up = loss["low_rank"]
        z += down.reshape(-1, down.shape[-1])[at] @ up.t()
    z *= loss.get("logit_scale", 1.0)
    softcap = loss.get("softcap")
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _potential(term: TermSum, of: Potentials, at: Tensor, log_q: Tensor) -> Tensor:
    """P of rows `at`, [R, V]."""
    p = torch.zeros_like(log_q)
    if of.columns is not None:
        p += of.columns.to(p.dtype)
    if of.features is not None:
        assert term.features is not None
        kappa = of.features.reshape(-1, of.features.shape[-1])[at].to(p.dtype)
        p += torch.sparse.mm(term.features.to(p.dtype), kappa.t()).t()
    if of.entropy is not None:
        p -= of.entropy.reshape(-1, 1)[at].to(p.dtype) * log_q
    return p
