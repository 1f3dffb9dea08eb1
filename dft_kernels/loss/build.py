"""A call of a public function, checked and flattened into a `Problem`, one family of arguments after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import backends
from ..backends.contract import Row
from ..distributed.shards import Called, Shards, agree
from .checks import FLOATING, Checks, Fields, transformed
from .inputs import called, inputs, over_processes, parts
from .options import Function, LossOptions, complete
from .planning import check_plan, plan_fields
from .potentials import potential_fields
from .problem import NEEDS, Problem, needs_gradient
from .reported import metric_names, reported
from .teacher import teacher_fields
from .weights import weight_fields


def build(
    function: Function,
    hidden: Any,
    weight: Any,
    target: Any,
    teacher: Any,
    given: Mapping[str, Any],
    *,
    bias: Any = None,
    class_weight: Any = None,
    rows: int | None = None,
    also: Callable[[Problem], None] | None = None,
) -> Problem:
    """Check a call before any work. given: the options that it was called with; bias, class_weight: those of a function
    that has its own names for them; rows: bit r: Row(r) is all that a function of statistics returns;
    None: whatever there is; also: a check of the function's own."""
    options = complete(function, given)
    if bias is not None:
        options["bias"] = bias
    group, size = over_processes(function, hidden, weight, options)
    if group is None:
        return _checked(function, hidden, weight, target, teacher, options, given, class_weight, rows, also)[1]

    def made(shards: Shards) -> tuple[Problem, Called, str, bool]:
        some = (hidden, weight, target, teacher, options, given, class_weight, rows, also)
        check, problem = _checked(function, *some, group, shards)
        if transformed(problem.differentiated):
            remedy = "Use backward(), or the whole vocabulary in each process"
            check.fail("process_group", "come without transforms of torch.func and forward mode", "one", remedy)
        told = hasattr(hidden if weight is None else weight, "placements")
        looks = told or problem.compact or problem.hidden.device.type == "cpu"
        return problem, *called(function, problem, teacher, looks, told), looks

    name = function.names[1 if function.projected else 0]
    compiling = torch.compiler.is_compiling()
    together = torch.compiler.disable(agree, reason="processes exchange sizes") if compiling else agree
    return together(function.name, name, group, size, made)  # type: ignore[no-any-return]


def check_options(function: Function, options: Mapping[str, Any], teacher: Any = None, device: Any = None) -> None:
    """What can be told of options before there is a batch: on one row, two tokens, nothing computed. teacher: of that
    row; device: None where it is not known yet, so that a backend is one by its name alone."""
    if device is None and options.get("backend") in backends.BACKENDS:
        options = {**options, "backend": "auto"}
    held = options.get("logits_dtype")  # which the hidden states may turn out to have
    hidden = torch.zeros(1, 1, device=device, dtype=held if held in FLOATING else None)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    build(function, hidden, hidden.new_zeros(2, 1), label, teacher, options)


def _checked(
    function: Function,
    hidden: Any,
    weight: Any,
    target: Any,
    teacher: Any,
    options: LossOptions,
    given: Mapping[str, Any],
    class_weight: Any,
    rows: int | None,
    also: Callable[[Problem], None] | None,
    group: Any = None,
    shards: Shards | None = None,
) -> tuple[Checks, Problem]:
    tensors = parts(function, hidden, weight, options, group)
    check, fields = inputs(function, tensors, shards, target, options)
    target = fields["target"]
    fields |= teacher_fields(check, teacher, target is not None, options, given)
    fields |= weight_fields(check, target, teacher is not None, class_weight, options, given)
    fields |= potential_fields(check, options, given)
    fields |= plan_fields(check, options)
    metrics = metric_names(check, options["return_metrics"])
    if target is None and teacher is None and not function.statistics and _asks_nothing(fields):
        check.fail("target or teacher", "be given", "neither", "Pass labels, a teacher, or a potential")
    differentiable = (fields["hidden"], fields["weight"], fields["bias"], fields["down"], fields["up"])
    fields |= zip(NEEDS, map(needs_gradient, differentiable), strict=True)
    asked = reported(metrics, function.statistics, fields["label_smoothing"] != 0) if rows is None else rows
    asked |= (function.statistics or bool(metrics)) << len(Row)
    means = function.statistics if rows is None else False
    problem = Problem(
        **fields,
        reported=asked,
        columns=means or ("mean_probability" in metrics and fields["group"] is not None),
    )
    check_plan(check, problem, teacher, function.statistics or problem.reduction == "none")
    if also is not None:
        also(problem)
    return check, problem


def _asks_nothing(fields: Fields) -> bool:
    terms = (fields["potential"], fields["feature_weight"], fields["entropy_weight"])
    return fields["z_loss"] == 0 and all(term is None for term in terms)
