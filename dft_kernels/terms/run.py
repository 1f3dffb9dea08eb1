"""Terms beside the fused loss, exactly: a pass of statistics before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..loss.functional import linear_distribution_loss, linear_distribution_statistics
from .pull import (
    STATISTICS,
    TermLoss,
    cast,
    checked,
    filled,
    joined,
    linear_part,
    pull,
    reduced,
    slopes,
    with_whole_mean,
)


def exact(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    term: Any,
    *,
    input_ids: Tensor | None = None,
    teacher: Any = None,
    cross_fit: bool = False,
    return_metrics: bool = False,
    **loss: Any,
) -> TermLoss:
    """The fused loss plus J of this batch's own statistics, exactly differentiated.

    A pass of statistics, J and its gradient on small tensors, and the fused loss with that gradient as a potential:
    4 products for the loss's 3. Where torch.distributed runs, statistics are summed over all processes (each of which
    must call this); under gradient accumulation they are each micro-batch's own: use `Delayed`.

    cross_fit: the gradient at odd sequences comes from the statistics of the even ones, and the other way round. J of
    a batch's own f_hat overestimates J(f), for ‖f - t‖² by Var(f_hat), and its G leans towards the rows it is made of;
    halves that know nothing of each other remove that, exactly where J is quadratic. The value is then
    2 J(all) - sum_halves share J(half), which has the same property.

    Args:
        hidden: [B, T, H] (or [T, H], one sequence); weight: [V, H]; target: [B, T] int64, None: all rows count.
        term: a `DistributionTerm` or a sum of them; input_ids: [B, T] int64, what was read, where a term asks for it.
        loss: keywords of `linear_distribution_loss`; reduction "mean" only.

    Returns: `TermLoss`. Raises ValueError or TypeError for a wrong argument before any work. Memory: that of the
    loss, and [B, T, K] for terms with K features.
    """
    terms, rows = checked("exact", term, hidden, weight, target, input_ids, loss)
    if cross_fit and rows.weight.shape[0] < 2:
        fail("exact", "cross_fit=True", "come with two sequences or more", len(rows.weight), "Leave it at False")
    asked = {name: loss[name] for name in STATISTICS if name in loss}
    lead, half = hidden.shape[:-1], None
    if cross_fit:
        half = torch.arange(len(rows.weight), device=hidden.device).remainder(2)[:, None].expand_as(rows.weight)
        asked |= {"group": half.reshape(lead), "num_groups": 2}
    with torch.no_grad():
        found = linear_distribution_statistics(hidden, weight, target, features=terms.features, **asked)
        found = with_whole_mean(found, weight)
    shape, masks = rows.weight.shape, [torch.ones_like(rows.weight, dtype=torch.bool)]
    if half is not None:
        masks = [half == 0, half == 1]
    parts = []
    for mask, mean in zip(masks, found.mean_probability.double(), strict=True):
        by = torch.where(mask, rows.weight, 0.0)
        parts.append(replace(rows, weight=by, columns=by.sum() * mean))
    seen = filled(terms, parts, found.features, found.entropy, found.log_prob, shape)
    moments = [reduced(terms.gathered(part)) for part in seen]
    whole = terms.split(torch.stack([each.flat() for each in moments]).sum(0))
    of = [slopes(terms, each) for each in moments]
    values = of[0].values
    if half is not None:
        shares = [each.total / torch.where(whole.total == 0, 1.0, whole.total) for each in moments]
        of_both = zip(terms.values(whole), *(each.values for each in of), strict=True)
        values = [2 * v - shares[0] * a - shares[1] * b for v, a, b in of_both]
    # a half's rows take the potential of the other half's statistics
    pulls = [pull(terms, each, part) for each, part in zip(of[::-1], seen, strict=True)]
    given: dict[str, Any] = {}
    if terms.columns:
        given["potential"] = torch.stack([each.columns for each in pulls if each.columns is not None])
        given |= {} if half is None else {"group": asked["group"], "num_groups": 2}
    kappa = [each.features for each in pulls if each.features is not None]
    eta = [each.entropy for each in pulls if each.entropy is not None]
    if kappa:
        given |= {"features": terms.features, "feature_weight": sum(kappa[1:], kappa[0]).reshape(*lead, -1)}
    if eta:
        given["entropy_weight"] = sum(eta[1:], eta[0]).reshape(lead)
    out = linear_distribution_loss(
        hidden, weight, target, teacher, return_metrics=return_metrics, **{**loss, **cast(given, hidden)}
    )
    fused, metrics = out if return_metrics else (out, None)
    of_potentials = sum(linear_part(each, part) for each, part in zip(pulls, seen, strict=True))
    return joined(terms, fused, of_potentials, values, rows.weight.sum(), loss.get("num_items"), metrics)
