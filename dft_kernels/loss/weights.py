"""What a call weighs: its terms, its rows, and what the sum is divided by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .checks import Checks, Fields
from .options import LossOptions, untouched


def _num_items(check: Checks, value: Any, reduction: str) -> Tensor | None:
    """What "mean" divides by instead, 0-d."""
    if value is None:
        return None
    if reduction != "mean":
        remedy = "Divide the result yourself, or use reduction='mean'"
        check.fail("num_items", "come with reduction='mean'", f"reduction={reduction!r}", remedy)
    if isinstance(value, Tensor):
        check.tensor("num_items", value)
        if value.ndim != 0 or value.requires_grad:
            check.fail("num_items", "be a number or a 0-d tensor without grad", list(value.shape), "Pass its sum")
        return value
    number = check.positive("num_items", value)
    return torch.tensor(number, dtype=torch.float64)


_EVEN: Fields = {
    "row_weight": None,
    "num_items": None,
    "hard_weight": 0.0,
    "soft_weight": 0.0,
    "soft_scale": 1.0,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
}
_OPTIONS = {*_EVEN, "temperature", "temperature_scaling"}


def weight_fields(
    check: Checks,
    target: Tensor | None,
    taught: bool,
    class_weight: Any,
    options: LossOptions,
    given: Collection[str],
) -> Fields:
    """The weights of the parts of a row's loss, of the rows, and the reduction over them. given: the names of options
    that are not defaults."""
    if class_weight is None and untouched(given, _OPTIONS):
        return {**_EVEN, "hard_weight": float(target is not None and not taught), "soft_weight": float(taught)}
    check.choice("temperature_scaling", options["temperature_scaling"], ("none", "squared"))
    label_smoothing = check.number("label_smoothing", options["label_smoothing"], "lie in 0..1", lambda x: 0 <= x <= 1)
    soft_weight = check.number("soft_weight", options["soft_weight"], "be a number")
    hard_weight = options["hard_weight"]
    if hard_weight is None:
        hard_weight = 0.0 if taught or target is None else 1.0
    hard_weight = check.number("hard_weight", hard_weight, "be a number or None")
    if target is None and (hard_weight != 0 or label_smoothing != 0):
        got = f"None with hard_weight={hard_weight}, label_smoothing={label_smoothing}"
        check.fail("target", "be given where a cross-entropy is asked for", got, "Pass the labels")
    ignore_index = options["ignore_index"]
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        check.fail("ignore_index", "be an int", repr(ignore_index), "The usual one is -100", TypeError)
    row_weight = check.per_row("row_weight", options["row_weight"], floating=True)
    reduction = check.choice("reduction", options["reduction"], ("mean", "sum", "none"))
    return {
        "row_weight": _with_class_weight(check, class_weight, target, row_weight, label_smoothing),
        "num_items": _num_items(check, options["num_items"], reduction),
        "hard_weight": hard_weight,
        "soft_weight": soft_weight if taught else 0.0,
        "soft_scale": options["temperature"] ** 2 if options["temperature_scaling"] == "squared" else 1.0,
        "label_smoothing": label_smoothing,
        "z_loss": check.number("z_loss", options["z_loss"], "be at least 0", lambda x: x >= 0),
        "ignore_index": ignore_index,
        "reduction": reduction,
    }


def _with_class_weight(
    check: Checks, value: Any, target: Tensor | None, row_weight: Tensor | None, label_smoothing: float
) -> Tensor | None:
    """Class weights are row weights: w[y_n], which "mean" sums as torch does. With smoothing they are not."""
    if value is None or target is None:
        return row_weight
    check.shape("weight", check.constant("weight", value), (check.whole_vocab,), "V")
    if label_smoothing != 0:
        got = f"label_smoothing={label_smoothing}"
        check.fail("weight", "come without label_smoothing", got, "Use one of the two, or F.cross_entropy")
    weight: Tensor = value.index_select(0, target.clamp(0, check.whole_vocab - 1))
    return weight if row_weight is None else weight * row_weight
