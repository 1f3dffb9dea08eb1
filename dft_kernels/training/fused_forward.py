"""A causal LM's own forward pass with the fused loss in place of its head's product and its cross-entropy.

The forward that transformers (or who wrapped it) wrote runs as it is, with two replacements: the head, which records
the hidden states and computes nothing, and `loss_function`, which computes the fused loss of these. Whatever else that
forward does, the router's loss of a mixture of experts above all, stays in the result.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import fail
from ..loss.functional import linear_distribution_loss, shift_labels
from ..loss.metrics import Metrics
from ..models.heads import (
    apart,
    attempt,
    called_as,
    in_mode,
    loss_replaced,
    output_layer,
    parted,
    projection,
    tapped,
)
from ..teachers.contract import Head

WEIGHTS = ("soft_weight", "hard_weight")  # that a call may give for itself
OURS = ("teacher", "shift_labels", "num_items_in_batch", "return_logits", "distribution_terms", *WEIGHTS)
_NOT_FORWARDED = ("labels", "logits_to_keep", "return_dict", *OURS)


@dataclass
class DistributionOutput(CausalLMOutputWithPast):
    """What an attached model returns with a loss. logits: None unless return_logits; aux_loss: the router's loss of a
    mixture of experts where the model computes it, which `loss` has with the model's own coefficient."""

    metrics: Metrics | None = None
    aux_loss: Tensor | None = None


_OUTPUTS = tuple(one.name for one in fields(DistributionOutput))


@dataclass
class Attachment:
    """What `attach` keeps of a model."""

    original: Any  # the forward that was there: of the instance, or None for its class's
    accepts: Any  # accepts_loss_kwargs of the instance, None where it had none
    signature: inspect.Signature  # of that forward
    head: Head  # its constants; weight and bias are read from the model at every call
    terms: dict[str, Any]
    calls_loss: dict[bool, bool] = field(default_factory=dict)  # by model.training: that forward calls loss_function
    reached: bool = True  # the call of the model that is in progress has come to the attached forward
    hooks: list[Any] = field(default_factory=list)
    by: str = "attach"  # the function that made it
    wide: bool = False  # the head is multiplied in fp32, outside of autocast

    def own(self, model: Any) -> Callable[..., Any]:
        """The forward that was there."""
        return functools.partial(type(model).forward, model) if self.original is None else self.original

    @property
    def takes_more(self) -> bool:
        """Whether that forward takes any keyword."""
        return any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())

    def named(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        positional = [p.name for p in self.signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(arguments) > len(positional):
            got = f"{len(arguments)} where {len(positional)} have names"
            fail(self.by, "arguments", "be given by keyword", got, "Call model(input_ids=..., labels=...)")
        return {**dict(zip(positional, arguments, strict=False)), **keywords}


def with_loss(model: Any, attachment: Attachment, given: dict[str, Any], ours: dict[str, Any]) -> DistributionOutput:
    """The output of the model's own forward on `given`, with the fused loss."""
    layer, target = output_layer(model), targets_of({**given, "shift_labels": ours.get("shift_labels")})
    found: dict[str, Any] = {}

    def loss_of(hidden: Tensor) -> Tensor:
        loss, found["metrics"] = fused_loss(layer, attachment, hidden, target, given, ours)
        found["hidden"] = hidden
        return loss

    out, loss = run_forward(model, attachment, given, target, loss_of)
    kept = {name: out.get(name) for name in _OUTPUTS}
    logits = _logits(layer, attachment.head, found["hidden"], given) if ours.get("return_logits") else None
    return DistributionOutput(**{**kept, "loss": loss, "logits": logits, "metrics": found["metrics"]})


def run_forward(
    model: Any, attachment: Attachment, given: dict[str, Any], target: Tensor, compute: Callable[[Tensor], Tensor]
) -> tuple[Any, Tensor]:
    """The output of the model's own forward on `given` without its head's product, and its loss with compute(hidden) in
    place of its cross-entropy. target: the label of every row [B, T]."""
    called: list[bool] = []

    def loss_of(*_: Any, **__: Any) -> Tensor:
        called.append(True)
        return compute(tap.hidden(model, tuple(target.shape)))

    forwarded = {name: value for name, value in given.items() if name not in _NOT_FORWARDED}
    if not getattr(model.config, "return_dict", True):
        forwarded["return_dict"] = True
    calls_loss = attachment.calls_loss[model.training]
    if calls_loss:  # without labels the forward would not ask for a loss; their values are read by loss_of alone
        forwarded["labels"] = target if given.get("labels") is None else given["labels"]
    with tapped(model) as tap, loss_replaced(model, loss_of) if calls_loss else nullcontext():
        out = attachment.own(model)(**forwarded)
    if calls_loss and not called:
        got = "a forward that did not"
        remedy = f"Give the model the same settings when {attachment.by} is called and in training"
        fail(attachment.by, type(model).__name__, "compute its loss by loss_function, as it did at attach", got, remedy)
    if not calls_loss and out.get("aux_loss") is not None:
        got = "one with aux_loss, whose weight is not known"
        remedy = "Set output_router_logits=False, or detach(model) and use the model's own loss"
        fail(attachment.by, type(model).__name__, "return an output without another loss", got, remedy)
    return out, out.loss if calls_loss else loss_of()


def projected(layer: Any, attachment: Attachment, hidden: Tensor, compute: Callable[[dict[str, Any]], Any]) -> Any:
    """compute(hidden states and head as a loss takes them). ValueError for a head that other processes have parts of in
    a way that the loss does not take."""
    constants = {"logit_scale": attachment.head.logit_scale, "softcap": attachment.head.softcap}

    def forward(hidden: Tensor) -> Any:
        if (split := parted(layer)) is not None:
            remedy = "Call attach before DeepSpeed or FSDP2 takes the model; use FSDP2 in place of FSDP1"
            fail(attachment.by, "the head", "be whole where it is called, or divided by rows", split, remedy)
        with torch.autocast(hidden.device.type, enabled=False) if attachment.wide else nullcontext():
            hidden = hidden.float() if attachment.wide else hidden
            head = projection(layer, hidden)
            if attachment.wide:
                head = {name: _float(part) for name, part in head.items()}
            return compute({"hidden": hidden, **head, **constants})

    return called_as(layer, forward, hidden) if apart(layer) else forward(hidden)


def _float(part: Any) -> Any:
    return tuple(map(_float, part)) if isinstance(part, tuple) else part if part is None else part.float()


def fused_loss(
    layer: Any, attachment: Attachment, hidden: Tensor, target: Tensor, given: dict[str, Any], ours: dict[str, Any]
) -> tuple[Tensor, Metrics]:
    """Loss and metrics of hidden states [B, T, H] with labels `target`, as a call of an attached model has them."""
    terms, teacher = attachment.terms, ours.get("teacher")
    terms = {**terms, **{name: ours[name] for name in WEIGHTS if ours.get(name) is not None}}
    if teacher is None:
        terms = {**terms, "hard_weight": 1.0}
    elif given.get("labels") is None and ours.get("shift_labels") is None and terms.get("hard_weight"):
        relation = f"be given with hard_weight={terms['hard_weight']}"
        fail(attachment.by, "labels", relation, "None", "Pass labels=input_ids, padding -100")
    delayed = ours.get("distribution_terms")

    def loss_of(head: dict[str, Any]) -> tuple[Tensor, Metrics]:
        call: dict[str, Any] = {
            **{"target": target.to(hidden.device), "teacher": teacher, "num_items": ours.get("num_items_in_batch")},
            **{**head, **terms, "return_metrics": True},
        }
        if delayed is None:
            return linear_distribution_loss(**call)
        loss, _, _, metrics = delayed.loss(input_ids=given.get("input_ids"), **call)
        return loss, metrics

    found: tuple[Tensor, Metrics] = projected(layer, attachment, hidden, loss_of)
    return found


def _logits(layer: Any, head: Head, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    keep = given.get("logits_to_keep")
    keep = 0 if keep is None else keep
    rows = hidden[:, slice(-keep, None)] if isinstance(keep, int) else hidden[:, keep]
    logits: Tensor = layer(rows) * head.logit_scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


@torch.no_grad()
def check_loss(model: Any, attachment: Attachment) -> None:
    """Compare the model's own loss of two short sequences with the fused one, in both modes, and note whether its
    forward calls `loss_function`. ValueError where they differ."""
    weight, name = output_layer(model).weight, type(model).__name__
    ids = torch.arange(1, 13, device=weight.device).view(2, 6) % weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2] = -100
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    if not attachment.takes_more:
        given = {key: value for key, value in given.items() if key in attachment.signature.parameters}
    remedy = "Take its hidden states and call linear_distribution_loss with the labels that it means"
    devices = range(torch.cuda.device_count()) if weight.is_cuda else ()
    for training in (False, True):
        with in_mode(model, training), torch.random.fork_rng(devices):
            own, calls = model.loss_function, list[int]()
            torch.manual_seed(0)  # both passes draw the same dropout
            with loss_replaced(model, _counted(own, calls)):
                out = attempt(model, "a forward that takes padded token ids and labels", attachment.own(model), **given)
            attachment.calls_loss[training] = bool(calls)
            if getattr(out, "loss", None) is None or len(calls) > 1:
                got = f"{type(out).__name__} without a loss" if len(calls) < 2 else f"{len(calls)} losses"
                fail(attachment.by, name, "return one loss of labels", got, remedy)
            torch.manual_seed(0)
            fused = functools.partial(with_loss, model, attachment, given, {})
            ours, theirs = float(attempt(model, "a forward that takes another loss", fused).loss), float(out.loss)
        precision = max(2e-4, 2 * torch.finfo(weight.dtype).eps)
        if not abs(theirs - ours) < precision * max(1.0, abs(theirs)):
            got = f"{theirs:.5f} where that is {ours:.5f}"
            fail(attachment.by, name, "have the next token's cross-entropy as its loss", got, remedy)


def _counted(own: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def loss_function(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return own(*arguments, **named)

    return loss_function


def targets_of(inputs: Any) -> Tensor:
    """The label of every row [B, T], -100 where it is in no term: of a model's inputs, as an attached forward reads
    them."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shifted is not None:
        return shifted  # type: ignore[no-any-return]
    return shift_labels(labels if labels is not None else _where_there_is_text(inputs))


def _where_there_is_text(given: dict[str, Any]) -> Tensor:
    """Labels that say no more than which positions have a token: a teacher alone needs no others."""
    ids, remedy = given.get("input_ids"), "Pass labels, -100 where a row is to be left out"
    if ids is None:
        fail("attach", "labels", "be given with inputs_embeds", "None", remedy)
    mask = given.get("attention_mask")
    if mask is None:
        return ids
    if mask.shape != ids.shape:
        fail("attach", "labels", "be given with an attention mask that is not [B, T]", list(mask.shape), remedy)
    found: Tensor = ids.masked_fill(mask == 0, -100)
    return found
