"""The functions users call. Each checks its call into a `Problem`, runs one operator, and shapes the result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Row
from ..errors import fail
from ..teachers.contract import Source
from . import autograd
from .autograd import InplaceLoss
from .metrics import Metrics, metrics_of
from .problem import Problem, build
from .row_loss import loss_rows


@dataclass(frozen=True)
class DistributionStatistics:
    """Differentiable statistics of the model's distributions q = softmax(z), fp32 (fp64 for fp64).

    log_prob, entropy, lse, divergence: hidden's leading shape, 0 for ignored rows. features: q @ features
    [..., K]. mean_probability: [num_groups, V], a zero row for an empty group; empty: [num_groups] bool.
    None where the call gave nothing to compute it from.
    """

    log_prob: Tensor | None
    entropy: Tensor
    lse: Tensor
    divergence: Tensor | None
    features: Tensor | None
    mean_probability: Tensor
    empty: Tensor


def linear_distribution_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    teacher: Any = None,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    divergence: Any = "forward_kl",
    soft_weight: float = 1.0,
    hard_weight: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_scaling: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    potential: Tensor | None = None,
    group: Tensor | None = None,
    num_groups: int = 1,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: Any = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    compact: bool = True,
    backend: str = "auto",
    return_metrics: bool | Collection[str] = False,
) -> Any:
    """The loss of distribution fine-tuning, from hidden states, never holding the [N, V] logits.

        z = cap(logit_scale * (hidden @ weight.T + down @ up.T + bias)),  cap(x) = softcap * tanh(x / softcap)
        loss_n = hard_weight * CE_n + soft_weight * D_n + z_loss * lse_n^2 + <q_n, potential[group_n]>
                 + <q_n @ features, feature_weight_n> + entropy_weight_n * H(q_n)

    q = softmax(z) and lse = logsumexp(z) at T = 1; CE_n = -log q_n[target_n], smoothed towards uniform by
    label_smoothing as `F.cross_entropy` does; D_n = D(softmax(teacher / teacher_temperature), softmax(z /
    temperature)), times temperature^2 under temperature_scaling="squared" (Hinton et al., arXiv:1503.02531).

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64. N is the product of the leading dimensions.
        weight: [V, H], hidden's dtype; bias: [V]. Under autocast they are cast as `F.linear` would.
        low_rank: (down [..., r], up [V, r]), an adapter of the head, of the same dtype. For the A, B of LoRA
            (arXiv:2106.09685) down = scale * F.linear(hidden, A), which autograd differentiates, and up = B.
        target: [...] int64 labels; a row whose label is ignore_index is out of every term.
        teacher: a tensor of logits [..., V], `TeacherLogits`, `TeacherHead`, `TopK`, `LogitStream` or `Mixture`;
            any floating dtype. No gradient flows to it, and one that requires grad is refused.
        divergence: a name of `dft_kernels.divergences.TABLE`, or what its functions return.
        hard_weight: None: 1 without a teacher, 0 with one.
        teacher_temperature: None: the same as temperature.
        z_loss: weight of lse^2 (PaLM, arXiv:2204.02311, section 5).
        potential: [num_groups, V], with group [...] int64 (None: all rows in group 0); no gradient flows to it.
        features: [V, K], dense or sparse (COO, CSR), floating; feature_weight: [..., K]; entropy_weight: [...].
        row_weight: [...], multiplies a row's whole loss; a row of weight 0 is skipped, never multiplied.
        reduction: "mean" divides by the number of valid rows (by the sum of their row_weight where given),
            "sum" does not, "none" returns [...] and recomputes the logits in backward.
        num_items: a number or 0-d tensor that "mean" divides by instead, as under gradient accumulation.
        chunk_size: rows a chunk; memory_budget: bytes of scratch; neither: the planned default that
            `dft-kernels info` shows. The result does not depend on it beyond rounding.
        compact: leave ignored rows out of every product, at the price of one host synchronisation on a
            device. False: none; labels on a device are then not checked, a wrong one gives NaN.
        backend: "auto" or the name of one that is available.
        return_metrics: also return `Metrics`, from the same pass: True, all of them, or the names of some.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs), [...] for reduction="none"; with return_metrics, (loss, metrics).
        All rows ignored: 0 with zero gradients.

    Raises:
        ValueError, TypeError: a wrong argument, before any work is done. RuntimeError: double backward, or a
        stream's source failed.

    Memory: O(chunk x V) scratch and the returned gradients; with more than one chunk, dweight is summed in
    fp32. FLOPs: 2NHV a product; 3 products forward and backward, 4 with a `TeacherHead`, one less for each of
    hidden and weight that needs no gradient, 1 without any; reduction="none" costs one more.
    """
    problem = build(
        "linear_distribution_loss",
        hidden,
        weight,
        target,
        teacher,
        bias=bias,
        low_rank=low_rank,
        divergence=divergence,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        temperature_scaling=temperature_scaling,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        potential=potential,
        group=group,
        num_groups=num_groups,
        features=features,
        feature_weight=feature_weight,
        entropy_weight=entropy_weight,
        ignore_index=ignore_index,
        row_weight=row_weight,
        reduction=reduction,
        num_items=num_items,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        compact=compact,
        backend=backend,
        return_metrics=return_metrics,
    )
    return _finish(problem, hidden, teacher, {"return_metrics": return_metrics})


def distribution_loss(logits: Tensor, target: Tensor | None = None, teacher: Any = None, **terms: Any) -> Any:
    """`linear_distribution_loss` for a caller who already holds logits [..., V]: the same terms, no log-softmax copies.

    Takes every keyword of `linear_distribution_loss` but `bias` and `low_rank`; logit_scale and softcap act on
    `logits`. Beyond the returned gradient [..., V] in the logits' dtype, the extra memory is O(chunk x V). Errors are
    the same.
    """
    return _finish(_of_logits("distribution_loss", logits, target, teacher, terms), logits, teacher, terms)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **ours: Any,
) -> Any:
    """Cross-entropy of `input @ linear_weight.T + linear_bias`, as `F.linear_cross_entropy`, without logits.

    input: [..., H]; linear_weight: [V, H]; target: [...] int64; weight: [V] rescales each class, and "mean"
    then divides by the sum of the labels' weights. `ours`: keywords of `linear_distribution_loss`. Two
    departures from torch: the loss is fp32 whatever the input, and 0 (not NaN) where every row is ignored.
    Class probabilities, K-dimensional losses, and weight together with label_smoothing are refused.
    """
    teacher = ours.pop("teacher", None)
    problem = build(
        "linear_cross_entropy",
        input,
        linear_weight,
        target,
        teacher,
        names=("input", "linear_weight", "linear_bias"),
        labelled=True,
        bias=linear_bias,
        class_weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        **ours,
    )
    return _finish(problem, input, teacher, ours)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    inplace_gradient: bool = False,
    **ours: Any,
) -> Any:
    """Cross-entropy of logits [..., V] with target [...], as `F.cross_entropy` with the class dimension last.

    Arguments and departures are those of `linear_cross_entropy`. inplace_gradient=True writes the gradient over
    the logits, so that not even it costs memory: they are spent (their version is bumped, so that autograd
    refuses whoever still needs them), one backward is allowed, and torch.compile breaks its graph there.
    """
    teacher = ours.pop("teacher", None)
    terms = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing, **ours}
    problem = _of_logits("cross_entropy", logits, target, teacher, {"class_weight": weight, "labelled": True, **terms})
    if not (inplace_gradient and problem.need_hidden):
        return _finish(problem, logits, teacher, terms)
    if reduction == "none" or not logits.is_contiguous():
        got = f"reduction={reduction!r}, contiguous={logits.is_contiguous()}"
        relation = "come with a scalar reduction and contiguous logits"
        fail("cross_entropy", "inplace_gradient=True", relation, got, "Leave inplace_gradient at False")
    reason = "inplace_gradient writes over its argument; leave it at False to compile"
    return torch.compiler.disable(_inplace, reason=reason)(problem, logits, terms)


def linear_distribution_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    teacher: Any = None,
    *,
    group: Tensor | None = None,
    num_groups: int = 1,
    features: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    divergence: Any = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    compact: bool = True,
    backend: str = "auto",
) -> DistributionStatistics:
    """Differentiable statistics of the model's distributions, never holding the [N, V] logits.

        log_prob_n = log q_n[target_n]      entropy_n = -<q_n, log q_n>      lse_n = logsumexp(z_n)
        divergence_n = D(p_n, softmax(z_n / temperature))                    features_n = q_n @ features
        mean_probability_g = sum_{n in g} w_n q_n / sum_{n in g} w_n         w = row_weight, 1 where not given

    with q = softmax(z) at T = 1. Any scalar of them is an ordinary PyTorch loss: its backward recomputes each
    chunk's logits once. The arguments are those of `linear_distribution_loss`, and features [V, K], dense or
    sparse (COO, CSR), of any floating dtype. Only rows whose label is not ignore_index count.

    Memory: O(chunk x V) + [num_groups, V]. FLOPs: 1 product forward, 3 backward, each plus the teacher's.
    """
    problem = build(
        "linear_distribution_statistics",
        hidden,
        weight,
        target,
        teacher,
        statistics=True,
        group=group,
        num_groups=num_groups,
        features=features,
        bias=bias,
        low_rank=low_rank,
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        row_weight=row_weight,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        compact=compact,
        backend=backend,
    )
    result: DistributionStatistics = _outside_graph(_statistics, teacher)(problem, hidden.shape[:-1])
    return result


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Next-token labels [..., T] for hidden states at the same positions: out[..., t] = labels[..., t + 1].

    The last position has no next token and gets ignore_index, so neither labels nor hidden states are sliced
    (and copied); ignored rows cost nothing.
    """
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        fail("shift_labels", "labels", "be a tensor [..., T]", got, "Pass token ids", TypeError)
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _of_logits(function: str, logits: Tensor, target: Any, teacher: Any, terms: dict[str, Any]) -> Problem:
    for name in ("bias", "low_rank"):
        if name in terms:
            fail(function, name, "be left out", "one", "Add it to the logits, or call the linear_ function", TypeError)
    return build(function, logits, None, target, teacher, names=("logits", "", ""), projected=False, **terms)


def _outside_graph(function: Any, teacher: Any) -> Any:
    """`function`, kept out of torch.compile's graph where the teacher calls back into Python."""
    if not isinstance(teacher, Source):
        return function
    reason = f"a {type(teacher).__name__} calls back into Python; pass tensors to compile"
    return torch.compiler.disable(function, reason=reason)


def _finish(problem: Problem, hidden: Tensor, teacher: Any, terms: dict[str, Any]) -> Any:
    """Run the operator that the reduction asks for: the loss, or (loss, metrics)."""
    run = _outside_graph(_rows_loss if problem.reduction == "none" else _scalar_loss, teacher)
    loss, metrics = run(problem, hidden.shape[:-1])
    return (loss, metrics) if terms.get("return_metrics") else loss


def _scalar_loss(problem: Problem, lead: torch.Size) -> tuple[Tensor, Metrics | None]:
    loss, _, rows, features, mean, *_ = autograd.loss(*problem)
    return loss, metrics_of(problem, rows, features, mean, lead)


def _inplace(problem: Problem, logits: Tensor, terms: dict[str, Any]) -> Any:
    loss, _, rows, features, mean, *_ = InplaceLoss.apply(logits, problem)
    return (loss, metrics_of(problem, rows, features, mean, logits.shape[:-1])) if terms.get("return_metrics") else loss


def _rows_loss(problem: Problem, lead: torch.Size) -> tuple[Tensor, Metrics | None]:
    *rows, features, mean, _ = autograd.statistics(*problem)
    weight = problem.row_weight
    if weight is not None and problem.target is not None:
        weight = torch.where(problem.target != problem.ignore_index, weight, 0.0)
    loss = loss_rows(problem, rows, features, None if weight is None else weight.to(problem.dtype))
    known = [row.detach() for row in rows]
    return loss.reshape(lead), metrics_of(problem, known, features.detach(), mean.detach(), lead)


def _statistics(problem: Problem, lead: torch.Size) -> DistributionStatistics:
    *rows, features, mean, group_weight = autograd.statistics(*problem)
    return DistributionStatistics(
        log_prob=None if problem.target is None else rows[Row.LOG_PROB.value].reshape(lead),
        entropy=rows[Row.ENTROPY.value].reshape(lead),
        lse=rows[Row.LSE.value].reshape(lead),
        divergence=rows[Row.DIVERGENCE.value].reshape(lead) if problem.has_teacher else None,
        features=None if problem.features is None else features.reshape(*lead, problem.num_features),
        mean_probability=mean,
        empty=group_weight == 0,
    )
