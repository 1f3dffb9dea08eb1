"""The functions users call. Each checks its call into a `Problem`, runs it, and shapes the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.contract import Row
from ..errors import fail
from . import autograd
from .autograd import InplaceLoss, outside_graph
from .build import build
from .checks import transformed
from .metrics import Metrics, metrics_of
from .options import LOSS, OF_LOGITS, STATISTICS, Function, LossOptions, StatisticsOptions, documented
from .problem import Problem
from .row_loss import loss_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OF_CROSS_ENTROPY = ("teacher", "weight")
LINEAR_DISTRIBUTION_LOSS = Function("linear_distribution_loss")
DISTRIBUTION_LOSS = Function("distribution_loss", OF_LOGITS, ("logits", "", ""), projected=False)
LINEAR_CROSS_ENTROPY = Function(
    "linear_cross_entropy",
    tuple(name for name in LOSS if name != "bias"),
    ("input", "linear_weight", "linear_bias"),
    (*_OF_CROSS_ENTROPY, "linear_bias"),
    labelled=True,
)
CROSS_ENTROPY = Function(
    "cross_entropy",
    OF_LOGITS,
    ("logits", "", ""),
    (*_OF_CROSS_ENTROPY, "inplace_gradient"),
    projected=False,
    labelled=True,
)
LINEAR_DISTRIBUTION_STATISTICS = Function("linear_distribution_statistics", STATISTICS, statistics=True)


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


@documented(LINEAR_DISTRIBUTION_LOSS)
def linear_distribution_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    teacher: Any = None,
    **options: Unpack[LossOptions],
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
        logits_dtype: that a chunk's logits are held in: None, the accumulation dtype, or hidden's, at half the
            memory and less time on a GPU, as eager PyTorch, torch.compile and most libraries hold them. It costs
            accuracy: on SmolLM2's hidden states in bf16 the gradient of cross-entropy is off by 1.1 % (0.16 % in
            fp32), that of forward_kl by 3 % at a KL of 0.4, 16-20 % at 0.01 and 47 % at 0.001 (0.2 % in fp32),
            because q - p is then the difference of two rounded numbers. It is never chosen by itself.
        process_group: the vocabulary lies over its processes (a ProcessGroup, or a DeviceMesh of one dimension): each
            passes all rows of hidden, target and other tensors of rows, and its own part [V_i, ...] of the head
            (weight, bias, low_rank's up), in the order of ranks, of any sizes. A teacher's head or logits, potential
            and features are whole, or divided in the same way; ids are of the whole vocabulary. Loss, statistics and
            dhidden come out whole and alike everywhere, dweight, dbias, dup and mean_probability in parts. A weight
            that is a DTensor sharded over its rows needs no process_group. See `dft_kernels.distributed`.
        sum_hidden_gradient: False leaves dhidden (and ddown) as this process's part of a sum over process_group, for
            what sums it further up, as `dft_kernels.distributed.gather_rows` does.
        gradient_error: between 0 and 1: the relative error, in the Frobenius norm and beside rounding, that dhidden and
            dweight may have for leaving out columns of dlogits in the products that make them. `Metrics.dropped` is a
            bound of it, `Metrics.active_columns` the share that was multiplied; how they are chosen and bounded is told
            in `dft_kernels.backends.active` (the bound of dhidden is a measurement by random projections, and fails
            with a probability of at most 3e-4 a chunk). The bound is kept to gradient_error but where chunks' shares of
            dweight cancel. Loss, metrics and gradients of bias and low_rank miss nothing. Where few columns could be
            left out, as in the first steps of a training or under label_smoothing, all are multiplied. It takes, beyond
            memory_budget, up to a copy of a chunk's dlogits and one of the head in their dtype, and dweight's sum in
            fp32 where there are several chunks. The host looks at each chunk, whatever `compact` is; on a GPU it does
            not, and the device decides (`dft_kernels.backends.active_device`): no copy of the head is made, and a call
            most of whose columns are kept takes longer than an exact one. That is not for CUDA graphs either.
        compact: leave ignored rows out of every product, at the price of one host synchronisation on a
            device. False: none; labels on a device are then not checked, a wrong one gives NaN. (With process_group
            one more, for the calls to be compared; with compact=False none where the group has a CPU backend too, or
            has seen one division of a vocabulary and this kind of call before. A DTensor head is always compared.)
        backend: "auto" or the name of one that is available.
        return_metrics: also return `Metrics`, from the same pass: True, all of them, or the names of some.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs), [...] for reduction="none"; with return_metrics, (loss, metrics).
        All rows ignored: 0 with zero gradients.

    Raises:
        ValueError, TypeError: a wrong argument, before any work is done. RuntimeError: double backward, or a
        stream's source failed.

    Memory: O(chunk x V) scratch and the returned gradients. With more than one chunk, dweight is summed in fp32
    [V, H]; on a GPU dlogits [N, V] are kept instead, for one product, if they take no more than that or fit
    memory_budget beside a chunk. FLOPs: 2NHV a product; 3 products forward and backward, 4 with a `TeacherHead`,
    one less for each of hidden and weight that needs no gradient, 1 without any; reduction="none" costs one more.
    """
    return _loss(LINEAR_DISTRIBUTION_LOSS, hidden, weight, target, teacher, options)


@documented(DISTRIBUTION_LOSS)
def distribution_loss(
    logits: Tensor, target: Tensor | None = None, teacher: Any = None, **options: Unpack[LossOptions]
) -> Any:
    """`linear_distribution_loss` for a caller who already holds logits [..., V]: the same terms, no log-softmax copies.

    Takes every keyword of `linear_distribution_loss` but `bias` and `low_rank`; logit_scale and softcap act on
    `logits`. Beyond the returned gradient [..., V] in the logits' dtype, the extra memory is O(chunk x V). Errors are
    the same.
    """
    return _loss(DISTRIBUTION_LOSS, logits, None, target, teacher, options)


@documented(LINEAR_CROSS_ENTROPY)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    teacher: Any = None,
    **options: Unpack[LossOptions],
) -> Any:
    """Cross-entropy of `input @ linear_weight.T + linear_bias`, as `F.linear_cross_entropy`, without logits.

    input: [..., H]; linear_weight: [V, H]; target: [...] int64; weight: [V] rescales each class, and "mean"
    then divides by the sum of the labels' weights; all else as in `linear_distribution_loss`. Two departures from
    torch: the loss is fp32 whatever the input, and 0 (not NaN) where every row is ignored.
    Class probabilities, K-dimensional losses, and weight together with label_smoothing are refused.
    """
    more = {"bias": linear_bias, "class_weight": weight}
    return _loss(LINEAR_CROSS_ENTROPY, input, linear_weight, target, teacher, options, **more)


@documented(CROSS_ENTROPY)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    inplace_gradient: bool = False,
    teacher: Any = None,
    **options: Unpack[LossOptions],
) -> Any:
    """Cross-entropy of logits [..., V] with target [...], as `F.cross_entropy` with the class dimension last.

    Arguments and departures are those of `linear_cross_entropy`. inplace_gradient=True writes the gradient over
    the logits, so that not even it costs memory: they are spent (their version is bumped, so that autograd
    refuses whoever still needs them), one backward is allowed, torch.compile breaks its graph there, and transforms
    of torch.func are refused.
    """

    def check(problem: Problem) -> None:
        transforms, contiguous = transformed(problem.differentiated), logits.is_contiguous()
        if inplace_gradient and problem.need_hidden and (problem.reduction == "none" or not contiguous or transforms):
            got = f"reduction={problem.reduction!r}, contiguous={contiguous}, torch.func={transforms}"
            relation = "come with a scalar reduction, contiguous logits and no transform of torch.func"
            fail("cross_entropy", "inplace_gradient=True", relation, got, "Leave inplace_gradient at False")

    problem = build(CROSS_ENTROPY, logits, None, target, teacher, options, class_weight=weight, also=check)
    if not (inplace_gradient and problem.need_hidden):
        return _finish(problem, logits, teacher, options)
    reason = "inplace_gradient writes over its argument; leave it at False to compile"
    return torch.compiler.disable(_inplace, reason=reason)(problem, logits, options)


@documented(LINEAR_DISTRIBUTION_STATISTICS)
def linear_distribution_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    teacher: Any = None,
    **options: Unpack[StatisticsOptions],
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
    problem = build(LINEAR_DISTRIBUTION_STATISTICS, hidden, weight, target, teacher, options)
    result: DistributionStatistics = outside_graph(_statistics, problem, teacher)(problem, hidden.shape[:-1])
    return result


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Next-token labels [..., T] for hidden states at the same positions: out[..., t] = labels[..., t + 1].

    The last position has no next token and gets ignore_index, so neither labels nor hidden states are sliced
    (and copied); ignored rows cost nothing.
    """
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        fail("shift_labels", "labels", "be a tensor [..., T]", got, "Pass token ids", TypeError)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        fail("shift_labels", "labels", "be of an integer dtype", labels.dtype, "Pass token ids", TypeError)
    if labels.shape[-1] == 0:
        return labels.clone()
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _loss(
    function: Function, hidden: Any, weight: Any, target: Any, teacher: Any, options: LossOptions, **more: Any
) -> Any:
    return _finish(build(function, hidden, weight, target, teacher, options, **more), hidden, teacher, options)


def _finish(problem: Problem, hidden: Tensor, teacher: Any, options: LossOptions) -> Any:
    """Run what the reduction asks for: the loss, or (loss, metrics)."""
    run = outside_graph(_rows_loss if problem.reduction == "none" else _scalar_loss, problem, teacher)
    loss, metrics = run(problem, hidden.shape[:-1])
    return (loss, metrics) if options.get("return_metrics") else loss


def _scalar_loss(problem: Problem, lead: torch.Size) -> tuple[Tensor, Metrics | None]:
    loss, rows, features, mean, left_out = autograd.loss(problem)
    return loss, metrics_of(problem, rows, features, mean, lead, left_out)


def _inplace(problem: Problem, logits: Tensor, options: LossOptions) -> Any:
    loss, _, rows, features, mean, *_ = InplaceLoss.apply(logits, problem)
    return (
        (loss, metrics_of(problem, rows, features, mean, logits.shape[:-1])) if options.get("return_metrics") else loss
    )


def _rows_loss(problem: Problem, lead: torch.Size) -> tuple[Tensor, Metrics | None]:
    *rows, features, mean, _ = autograd.statistics(problem)
    weight = problem.row_weight
    if weight is not None and problem.target is not None:
        weight = torch.where(problem.target != problem.ignore_index, weight, 0.0)
    loss = loss_rows(problem, rows, features, None if weight is None else weight.to(problem.dtype))
    known = [row.detach() for row in rows]
    return loss.reshape(lead), metrics_of(problem, known, features.detach(), mean.detach(), lead)


def _statistics(problem: Problem, lead: torch.Size) -> DistributionStatistics:
    *rows, features, mean, group_weight = autograd.statistics(problem)
    return DistributionStatistics(
        log_prob=None if problem.target is None else rows[Row.LOG_PROB.value].reshape(lead),
        entropy=rows[Row.ENTROPY.value].reshape(lead),
        lse=rows[Row.LSE.value].reshape(lead),
        divergence=rows[Row.DIVERGENCE.value].reshape(lead) if problem.has_teacher else None,
        features=None if problem.features is None else features.reshape(*lead, problem.num_features),
        mean_probability=mean,
        empty=group_weight == 0,
    )
