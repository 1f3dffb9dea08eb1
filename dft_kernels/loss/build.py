"""A call of a public function, checked and flattened into a `Problem`, one family of arguments after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .inputs import inputs
from .options import Function, complete
from .planning import check_plan, plan_fields
from .potentials import potential_fields
from .problem import Problem, loss_terms
from .teacher import teacher_fields
from .wanted import metric_names, wanted
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
) -> Problem:
    """Check a call before any work. given: the options that it was called with; bias, class_weight: those of a function
    that has its own names for them."""
    options = complete(function, given)
    if bias is not None:
        options["bias"] = bias
    check, fields = inputs(function, hidden, weight, target, options)
    target = fields["target"]
    fields |= teacher_fields(check, teacher, target is not None, options, given)
    fields |= weight_fields(check, target, teacher is not None, class_weight, options, given)
    fields |= potential_fields(check, options, given)
    fields |= plan_fields(check, options)
    metrics = metric_names(check, options["return_metrics"])
    asked = (target, teacher, fields["potential"], fields["feature_weight"], fields["entropy_weight"])
    if not (function.statistics or fields["z_loss"] != 0 or any(term is not None for term in asked)):
        check.fail("target or teacher", "be given", "neither", "Pass labels, a teacher, or a potential")
    problem = Problem(
        **fields,
        wanted=0,
        reports=function.statistics or bool(metrics),
        columns=function.statistics or ("mean_probability" in metrics and fields["group"] is not None),
    ).with_needs()
    check_plan(check, problem, teacher, function.statistics or problem.reduction == "none")
    return problem._replace(wanted=wanted(problem, loss_terms(problem), metrics, function.statistics))
