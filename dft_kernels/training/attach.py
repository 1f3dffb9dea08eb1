"""One model's own forward, with the fused loss inside of it.

`attach` replaces `forward` on the instance, not on the class, and opt-in: where no loss is asked for, or a loss and its
logits (evaluation), the model's own forward runs, so that generate, evaluate, saving and loading stay as they were.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..loss.functional import linear_distribution_loss, shift_labels
from ..loss.metrics import Metrics
from ..models.heads import head_of, output_layer, parted, projection, unwrapped
from ..teachers.contract import Head

_THE_CALLS = ("bias", "low_rank", "logit_scale", "softcap", "reduction", "num_items", "ignore_index", "return_metrics")
_WEIGHTS = ("soft_weight", "hard_weight")  # that a call may give for itself
_OURS = ("teacher", "shift_labels", "num_items_in_batch", "return_logits", "distribution_terms", *_WEIGHTS)
_NOT_THE_BACKBONES = ("labels", "logits_to_keep", "return_dict", *_OURS)


@dataclass
class DistributionOutput(CausalLMOutputWithPast):
    """What an attached model returns with a loss; logits is None unless return_logits."""

    metrics: Metrics | None = None


class Held:
    """A teacher, or terms, as they are: mixed precision of FSDP2 casts the tensors in every container of inputs that it
    knows, down to a store's log-probabilities, and this is none of them."""

    def __init__(self, held: Any) -> None:
        self.held = held


class _Attachment(NamedTuple):
    original: Any  # the forward that was there: of the instance, or None for its class's
    accepts: Any  # accepts_loss_kwargs of the instance, None where it had none
    signature: inspect.Signature  # of that forward
    head: Head  # its constants; weight and bias are read from the model at every call
    terms: dict[str, Any]


def attach(model: Any, **terms: Any) -> Any:
    """Put the fused loss inside `model.forward`; returns the model.

        model(**batch, labels=labels).loss                      the fused cross-entropy, whatever hard_weight is
        model(**batch, labels=labels, teacher=teacher).loss     soft_weight D(teacher, model) + hard_weight CE

    model: a causal LM of transformers, inside of PEFT or not; LoRA on its head and a `CorrectionHead` are trained,
    other adapters there are refused. terms: keywords of `linear_distribution_loss` for every call: divergence,
    hard_weight, soft_weight, temperature, label_smoothing, ...

    In a call: `labels` [B, T] as transformers takes them, `shift_labels` [B, T] those that are shifted already;
    teacher: any teacher of `linear_distribution_loss`, whose row (b, t) is its distribution over token t + 1, so that
    rows line up with input_ids; num_items_in_batch: what the sum is divided by (Trainer gives it under gradient
    accumulation); return_logits=True: the logits too; distribution_terms: a `dft_kernels.terms.Delayed`, which the
    loss then has and is told of this batch, or an `OnPolicy`, which then is the loss, of labels that the model drew;
    soft_weight, hard_weight: of this call, with a teacher, None: those of `terms`. Without labels a teacher's rows
    count wherever the attention mask has a next token. The output's `metrics` are the kernel's. In evaluation mode
    labels alone take the model's own path.

    Under data parallelism attach first and wrap then (DDP, FSDP2, accelerate's prepare), and call the wrapper: around
    it, as `ddp.module(**batch)`, gradients stay this process's, and no one says so. The loss reads the head after the
    backbone ran: FSDP2 has to keep it in the root's unit or group it with the final norm, as accelerate does.

    Raises ValueError where the logits of hidden states and head are not the model's, proven on a few tokens.
    """
    causal = _causal(model)
    if "_dft_kernels" in causal.__dict__:
        _fail("model", "be without an attachment", "one that has one", "Call detach(model) first")
    for name in _THE_CALLS:
        if name in terms:
            _fail(
                name, "be left to the model and the call", "one", "The head's own are used; losses are means of tokens"
            )
    known = inspect.signature(linear_distribution_loss).parameters
    for name in terms:
        if name not in known:
            _fail(
                name, "be a keyword of linear_distribution_loss", "another", f"There are {', '.join(list(known)[4:])}"
            )
    head = head_of(causal, adapted=True)._replace(weight=None, bias=None)
    _check_loss(causal)
    original = causal.__dict__.get("forward")
    signature = inspect.signature(causal.forward)
    accepts = causal.__dict__.get("accepts_loss_kwargs")
    causal.__dict__["_dft_kernels"] = _Attachment(original, accepts, signature, head, terms)
    causal.accepts_loss_kwargs = True  # Trainer then gives num_items_in_batch, and divides by nothing itself
    causal.forward = types.MethodType(_forward(signature), causal)  # bound, so that a copy of the model binds its own
    return model


def detach(model: Any) -> Any:
    """Give the model its own forward back; returns the model."""
    causal = _causal(model)
    attachment = causal.__dict__.pop("_dft_kernels", None)
    if attachment is None:
        _fail("model", "be attached", "one that is not", "Call attach(model) first")
    del causal.__dict__["forward"]
    del causal.__dict__["accepts_loss_kwargs"]
    for name, value in (("forward", attachment.original), ("accepts_loss_kwargs", attachment.accepts)):
        if value is not None:
            causal.__dict__[name] = value
    return model


@torch.no_grad()
def _check_loss(model: Any) -> None:
    """That the model's own loss is the cross-entropy of the next token."""
    training = model.training
    model.eval()
    try:
        weight = output_layer(model).weight
        ids = torch.arange(1, 6, device=weight.device)[None] % weight.shape[0]
        out = model(input_ids=ids, labels=ids, use_cache=False)
    finally:
        model.train(training)
    expected = float(torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:]))
    if not abs(float(out.loss) - expected) < 1e-2 * max(1.0, expected):
        got = f"{float(out.loss):.4f} where that is {expected:.4f}"
        remedy = "Take its hidden states and call linear_distribution_loss with the labels that it means"
        _fail(type(model).__name__, "have the next token's cross-entropy as its loss", got, remedy)


def _causal(model: Any) -> Any:
    if isinstance(getattr(model, "module", None), torch.nn.Module):  # some of them pass on what they are asked for
        remedy = "Call attach(model) before it is wrapped, or on the wrapper's .module"
        _fail("model", "be what is inside of a wrapper", type(model).__name__, remedy)
    inner = unwrapped(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        _fail("model", "be a causal LM of transformers", type(model).__name__, "Pass what AutoModelForCausalLM loads")
    return inner


def _forward(signature: inspect.Signature) -> Any:
    """A function of that signature and our own keywords: what inspects a model's forward sees them."""

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return _call(self, arguments, named)

    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "return_logits" else None)
        for name in _OURS
        if name not in signature.parameters
    ]
    own = list(signature.parameters.values())
    rest = [own.pop()] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *own, *more, *rest])  # type: ignore[attr-defined]
    return forward


def _call(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    attachment: _Attachment = model.__dict__["_dft_kernels"]
    ours = {name: named.pop(name, None) for name in _OURS}
    ours.update({name: value.held for name, value in ours.items() if isinstance(value, Held)})
    bound = attachment.signature.bind_partial(*arguments, **named).arguments
    given = {**{n: v for n, v in bound.items() if n != "kwargs"}, **bound.get("kwargs", {})}
    labels, teacher = given.get("labels"), ours["teacher"]
    for name in _WEIGHTS:
        if teacher is None and ours[name] is not None:
            _fail("teacher", f"be given with {name}={ours[name]} in a call", "None", "Without one it is cross-entropy")
    asked = labels is not None or ours["shift_labels"] is not None or teacher is not None
    if not asked or (teacher is None and not model.training and ours["shift_labels"] is None):
        items, known = ours["num_items_in_batch"], attachment.signature.parameters
        takes = any(p.kind is p.VAR_KEYWORD for p in known.values()) or "num_items_in_batch" in known
        named = {**named, "num_items_in_batch": items} if takes and items is not None else named
        if attachment.original is not None:
            return attachment.original(*arguments, **named)
        return type(model).forward(model, *arguments, **named)
    if getattr(model.config, "output_router_logits", False) or given.get("output_router_logits"):
        remedy = "Set output_router_logits=False, or detach(model) and use the model's own loss"
        _fail("output_router_logits", "be False", "True, which adds a router's loss", remedy)
    return _with_loss(model, attachment, given, ours)


def _with_loss(model: Any, attachment: _Attachment, given: dict[str, Any], ours: dict[str, Any]) -> DistributionOutput:
    backbone = {name: value for name, value in given.items() if name not in _NOT_THE_BACKBONES}
    out = model.base_model(**backbone, return_dict=True)
    hidden = out.last_hidden_state
    target = targets_of({**given, "shift_labels": ours["shift_labels"]})
    layer, head, terms = output_layer(model), attachment.head, attachment.terms
    if (found := parted(layer)) is not None:
        remedy = (
            "Under FSDP2 leave it in the root's unit, or group it with the final norm: fully_shard([norm, lm_head])"
        )
        remedy += "; in place of ZeRO-3 use ZeRO-2 or FSDP2"
        _fail("the head", "be whole once the backbone ran", found, remedy)
    terms = {**terms, **{name: ours[name] for name in _WEIGHTS if ours[name] is not None}}
    if ours["teacher"] is None:
        terms = {**terms, "hard_weight": 1.0}
    elif given.get("labels") is None and ours["shift_labels"] is None and terms.get("hard_weight"):
        _fail(
            "labels", f"be given with hard_weight={terms['hard_weight']}", "None", "Pass labels=input_ids, padding -100"
        )
    call: dict[str, Any] = {
        **{"target": target.to(hidden.device), "teacher": ours["teacher"], "num_items": ours["num_items_in_batch"]},
        **{"logit_scale": head.logit_scale, "softcap": head.softcap, **projection(layer, hidden), **terms},
    }
    delayed = ours["distribution_terms"]
    if delayed is None:
        loss, metrics = linear_distribution_loss(hidden, **call, return_metrics=True)
    else:
        loss, _, _, metrics = delayed.loss(hidden, input_ids=given.get("input_ids"), return_metrics=True, **call)
    logits = None
    if ours["return_logits"]:
        keep = given.get("logits_to_keep") or 0
        rows = hidden[:, slice(-keep, None)] if isinstance(keep, int) else hidden[:, keep]
        logits = layer(rows) * head.logit_scale
        logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    return DistributionOutput(
        loss=loss,
        logits=logits,
        past_key_values=out.get("past_key_values"),
        hidden_states=out.get("hidden_states"),
        attentions=out.get("attentions"),
        metrics=metrics,
    )


def targets_of(inputs: Any) -> Tensor:
    """The label of every row [B, T], -100 where it is in no term: of a model's inputs, as an attached forward reads
    them."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shifted is not None:
        return shifted  # type: ignore[no-any-return]
    return shift_labels(labels if labels is not None else _where_there_is_text(inputs))


def _where_there_is_text(given: dict[str, Any]) -> Tensor:
    """Labels that say no more than which positions have a token: a teacher alone needs no others."""
    ids = given.get("input_ids")
    if ids is None:
        _fail("labels", "be given with inputs_embeds", "None", "Pass labels, -100 where a row is to be left out")
    mask = given.get("attention_mask")
    if mask is None:
        return ids
    if mask.shape != ids.shape:
        _fail("labels", "be given with an attention mask that is not [B, T]", list(mask.shape), "Pass labels")
    found: Tensor = ids.masked_fill(mask == 0, -100)
    return found


def _fail(argument: str, relation: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"attach: {argument} must {relation}, got {got}. {remedy}.")
