"""Potentials, groups, features and entropy weights of a call: what distribution terms pass to the loss."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .checks import Checks, Fields, flattened
from .options import LossOptions, untouched


def _own(check: Checks, value: Tensor, dim: int) -> Tensor:
    """What is of this process's columns, where the vocabulary lies over several and `value` [.., V, ..] is whole."""
    shards = check.shards
    if shards is None or value.ndim != 2 or value.shape[dim] != shards.total or shards.size == shards.total:
        return value
    if value.layout == torch.strided:
        return value.narrow(dim, shards.start, shards.size)
    index = torch.arange(shards.start, shards.start + shards.size, device=value.device)
    return value.to_sparse_coo().index_select(dim, index)


def _features(check: Checks, value: Any) -> tuple[Tensor | None, Tensor | None, int]:
    """Dense [V, K], or the values and indices of a sparse one; and K."""
    if value is None:
        return None, None, 0
    value = _own(check, check.constant("features", value), 0)
    if value.ndim != 2 or value.shape[0] != check.vocab:
        check.fail(
            "features", f"have shape [{check.vocab}, K]", list(value.shape), "Give one row for each vocabulary id"
        )
    if value.layout == torch.strided:
        return value, None, value.shape[1]
    value = value.to_sparse_coo().coalesce()
    return value.values(), value.indices(), value.shape[1]


def _feature_weight(check: Checks, value: Any, features: int | None) -> Tensor | None:
    """[..., K] beside features [V, K], flattened to [N, K]."""
    if value is None:
        return None
    if features is None:
        check.fail("features", "be given with feature_weight", "None", "Pass the features [V, K] that it weighs")
    check.constant("feature_weight", value)
    why = f"{check.names[0]}'s leading shape, then features' K"
    return flattened(check.shape("feature_weight", value, (*check.lead, features), why))


_NONE: Fields = {
    "potential": None,
    "group": None,
    "num_groups": 1,
    "features": None,
    "feature_index": None,
    "num_features": 0,
    "feature_weight": None,
    "entropy_weight": None,
}


def potential_fields(check: Checks, options: LossOptions, given: Collection[str]) -> Fields:
    """What is added to a row's loss beside cross-entropy and divergence, and the groups that rows are in. given: the
    names of options that are not defaults."""
    if untouched(given, _NONE):
        return _NONE
    group = check.per_row("group", options["group"], floating=False)
    num_groups = check.positive_int("num_groups", options["num_groups"])
    if group is None and num_groups > 1:
        check.fail("group", f"be given with num_groups={num_groups}", "None", "Pass the group of each row")
    potential = options["potential"]
    if potential is not None:
        potential = _own(check, check.constant("potential", potential), 1)
        check.shape("potential", potential, (num_groups, check.vocab), "num_groups, V")
    features, index, count = _features(check, options["features"])
    return {
        "potential": potential,
        "group": group,
        "num_groups": num_groups,
        "features": features,
        "feature_index": index,
        "num_features": count,
        "feature_weight": _feature_weight(check, options["feature_weight"], None if features is None else count),
        "entropy_weight": check.per_row("entropy_weight", options["entropy_weight"], floating=True),
    }
