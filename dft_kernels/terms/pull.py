"""Shared by exact and delayed terms: the gradient of J as a potential of the fused loss.

With the means m = sums / weights of `Moments`, W the rows' whole weight and D what the loss divides by,

    G = W dJ/d(sum w q) [V]      kappa_n = W / w_n dJ/ds_n [K]      eta_n = W / w_n dJ/dH_n

since the loss adds (1 / D) sum_n w_n (<q_n, G> + <s_n, kappa_n> + eta_n H_n). So accumulation and data parallelism
divide a term's gradient as they divide the loss's: by `num_items`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import fail
from ..loss.metrics import Metrics
from .base import Moments, Statistics, TermSum, as_sum

_OURS = ("potential", "group", "num_groups", "features", "feature_weight", "entropy_weight")
STATISTICS = (
    "bias", "low_rank", "logit_scale", "softcap", "ignore_index", "row_weight", "chunk_size", "memory_budget",
    "logits_dtype", "compact", "backend",
)  # fmt: skip # keywords of the loss that its statistics take too


class TermLoss(NamedTuple):
    """loss = fused + the sum of `terms`; it alone carries a gradient."""

    loss: Tensor
    fused: Tensor  # cross-entropy, divergence, ...
    terms: dict[str, Tensor]  # weight_i J_i by name, 0-d
    metrics: Metrics | None  # if requested


class Potentials(NamedTuple):
    """The gradient of J with respect to the statistics of each row."""

    columns: Tensor | None  # G [V]
    features: Tensor | None  # kappa [B, T, K]
    entropy: Tensor | None  # eta [B, T]
    divergence: Tensor | None = None  # [B, T]


def checked(
    function: str,
    term: Any,
    hidden: Any,
    weight: Any,
    target: Any,
    input_ids: Any,
    loss: dict[str, Any],
    own_text: bool = False,
) -> tuple[TermSum, Statistics]:
    """The sum of terms and the rows of a call, whose statistics are not there yet. own_text: the model wrote it."""
    terms = as_sum(function, term)
    if terms.divergence and not own_text:
        remedy = "On human text pass the reference as teacher, with soft_weight"
        fail(function, "term", "be without a ReferenceKL, which is of the model's own text", "one", remedy)
    if terms.reads is not None and not own_text:
        remedy = "Draw texts, and give it to OnPolicy"
        fail(function, "term", "be without a TextMMD, which is of texts of the model's own", "one", remedy)
    if terms.log_prob and own_text:
        remedy = "Take Entropy(value=h), h the model's cross-entropy on human text"
        fail(function, "term", "be without calibration on the model's own text", "Entropy(calibration=True)", remedy)
    if not isinstance(hidden, Tensor) or hidden.ndim not in (2, 3):
        got = str(list(hidden.shape)) if isinstance(hidden, Tensor) else type(hidden).__name__
        fail(
            function,
            "hidden",
            "be a tensor [B, T, H] or [T, H]",
            got,
            "Keep the sequences apart: terms know their order",
        )
    for name in _OURS:
        if name in loss:
            fail(function, name, "be left out", "one", "The terms give it", TypeError)
    if loss.get("reduction", "mean") != "mean":
        fail(function, "reduction", "be mean", repr(loss["reduction"]), "A term is of all rows together")
    if loss.get("process_group") is not None:
        remedy = "Pass the head as a DTensor, which says where its other rows are"
        fail(function, "process_group", "be left out with terms", "one", remedy)
    if (own_text or function == "gains") and hasattr(weight, "placements"):
        remedy = "Leave the head out of the tensor parallel plan"
        fail(function, "weight", "be whole in this process", "a part of the vocabulary", remedy)
    vocab = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None
    if vocab is not None and terms.vocab not in (None, vocab):
        remedy = "Build the terms with the model's vocabulary; padded ids have probability 0"
        fail(function, "term", f"be of the head's vocabulary of {vocab}", terms.vocab, remedy)
    if terms.log_prob and target is None:
        fail(function, "target", "be given where entropy is calibrated", "None", "Pass the labels")
    lead = hidden.shape[:-1]
    for name, given in (("target", target), ("row_weight", loss.get("row_weight"))):
        if given is not None and (
            not isinstance(given, Tensor) or given.shape != lead or given.device != hidden.device
        ):
            got = f"{list(given.shape)} on {given.device}" if isinstance(given, Tensor) else type(given).__name__
            fail(function, name, f"be a tensor {list(lead)} on {hidden.device}", got, "Give every row of hidden one")
    if input_ids is not None or terms.text:
        if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64:
            got = str(input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            remedy = "Pass the ids that the model read, one for each row of hidden"
            fail(function, "input_ids", "be a tensor of int64 where a term asks for the text", got, remedy, TypeError)
        if input_ids.shape != lead or input_ids.device != hidden.device:
            got = f"{list(input_ids.shape)} on {input_ids.device}"
            fail(function, "input_ids", f"be {list(lead)} on {hidden.device}", got, "Pass the ids that the model read")
    terms.on(hidden.device)
    return terms, rows_of(hidden[..., 0], target, input_ids, **of_rows(loss))


def of_rows(loss: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the loss that select and weight rows."""
    return {"row_weight": loss.get("row_weight"), "ignore_index": loss.get("ignore_index", -100)}


def rows_of(like: Tensor, target: Any, input_ids: Any, row_weight: Any, ignore_index: int) -> Statistics:
    """The rows of `like` [B, T] or [T]: their input ids and weights."""
    weight = torch.ones(like.shape, dtype=torch.float64, device=like.device)
    if row_weight is not None:
        weight = weight * row_weight
    if target is not None:
        weight = torch.where(target != ignore_index, weight, 0.0)
    weight = weight.reshape(-1, weight.shape[-1])
    ids = torch.zeros_like(weight, dtype=torch.int64) if input_ids is None else input_ids.reshape(weight.shape)
    return Statistics(ids, weight)


def filled(
    terms: TermSum,
    parts: list[Statistics],
    features: Any,
    entropy: Any,
    log_prob: Any,
    shape: torch.Size,
    divergence: Any = None,
) -> list[Statistics]:
    """Rows and the statistics of a pass, as far as the terms ask for them."""
    features = None if features is None else features.reshape(*shape, -1)
    entropy = entropy.double().reshape(shape) if terms.entropy else None
    log_prob = log_prob.double().reshape(shape) if terms.log_prob else None
    divergence = divergence.double().reshape(shape) if terms.divergence else None
    rows = {"features": features, "entropy": entropy, "log_prob": log_prob, "divergence": divergence}
    return [replace(part, **rows) for part in parts]


class Slopes(NamedTuple):
    """J at some moments, and its gradient: what does not depend on the rows that it is applied to."""

    values: list[Tensor]  # weight_i J_i
    total: Tensor  # 0-d, W
    columns: Tensor | None  # dJ/d(sum w q) [V]
    sums: Tensor | None  # [S]
    of_total: Tensor | None  # dJ/dW, and
    weights: Tensor | None  # [S], by what a sampled text changes which rows there are


def slopes(terms: TermSum, moments: Moments) -> Slopes:
    """By autograd, on the small vectors."""
    with torch.enable_grad():
        leaves = Moments(*(moment.detach().requires_grad_() for moment in moments))
        values = terms.values(leaves)
        found = Moments(*torch.autograd.grad(sum(values[1:], values[0]), leaves, allow_unused=True))
    detached = [value.detach() for value in values]
    return Slopes(detached, moments.total, found.columns, found.sums, found.total, found.weights)


def pull(terms: TermSum, of: Slopes, rows: Statistics) -> Potentials:
    """The potentials that they are for `rows`."""
    with torch.enable_grad():
        leaves = {
            name: leaf.detach().requires_grad_()
            for name in ("features", "entropy", "divergence")
            if (leaf := getattr(rows, name)) is not None
        }
        found: dict[str, Tensor | None] = {}
        if leaves and of.sums is not None:
            pulled = (terms.gathered(replace(rows, **leaves)).sums * of.sums).sum()
            grads = torch.autograd.grad(pulled, tuple(leaves.values()), allow_unused=True)
            found = dict(zip(leaves, grads, strict=True))
    live = rows.weight != 0
    scale = torch.where(live, of.total / torch.where(live, rows.weight, 1.0), 0.0)

    def scaled(name: str) -> Tensor | None:
        grad = found.get(name)
        return None if grad is None else grad * (scale[..., None].to(grad.dtype) if name == "features" else scale)

    columns = None if not terms.columns or of.columns is None else of.columns * of.total
    return Potentials(columns, scaled("features"), scaled("entropy"), scaled("divergence"))


def linear_part(of: Potentials, rows: Statistics) -> Tensor:
    """sum_n w_n (<q_n, G> + <s_n, kappa_n> + eta_n H_n)."""
    out = rows.weight.new_zeros(())
    if of.columns is not None and rows.columns is not None:
        out = out + (of.columns.double() * rows.columns).sum()
    if of.features is not None and rows.features is not None:
        out = out + (rows.weight * (of.features * rows.features).sum(-1)).sum()
    if of.entropy is not None and rows.entropy is not None:
        out = out + (rows.weight * of.entropy * rows.entropy).sum()
    return out


def joined(
    terms: TermSum, loss: Tensor, linear: Any, values: list[Tensor], weight: Tensor, items: Any, metrics: Any
) -> TermLoss:
    """Replace the value of the potentials by that of J; with num_items, by this batch's share of it."""
    denominator = torch.where(weight == 0, 1.0, weight) if items is None else items
    shares = [(value.detach() * weight / denominator).to(loss.dtype) for value in values]
    linear = (linear / denominator).to(loss.dtype)
    fused = loss.detach() - linear
    return TermLoss(loss - linear + sum(shares), fused, dict(zip(terms.names, shares, strict=True)), metrics)


def wide(hidden: Tensor) -> torch.dtype:
    """The dtype that the loss accumulates in."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def cast(given: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
    """Potentials in the dtype that the loss accumulates in."""
    names = ("potential", "feature_weight", "entropy_weight")
    return {name: value.to(wide(hidden)) if name in names else value for name, value in given.items()}


def with_whole_mean(found: Any, weight: Tensor) -> Any:
    """Statistics or metrics with the mean distribution over the whole vocabulary, where the head's rows lie over
    several processes (a DTensor)."""
    if found.mean_probability is None or not hasattr(weight, "placements"):
        return found
    from ..distributed.dtensor import group_over
    from ..distributed.shards import together

    group = group_over("terms", "weight", weight, 0)
    return replace(found, mean_probability=together(found.mean_probability.detach(), group))


def reduced(moments: Moments) -> Moments:
    """Summed over all processes. Those that have the same rows, as under tensor parallelism, count them alike, which
    leaves means as they are."""
    flat = summed(moments.flat())
    sizes = [part.numel() for part in moments]
    total, columns, sums, weights = flat.split(sizes)
    return Moments(total[0], columns, sums, weights)


def summed(flat: Tensor) -> Tensor:
    """Over all processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = flat.clone()
        torch.distributed.all_reduce(flat)
    return flat
