"""`attach`: the fused loss inside one model's forward.

`attach` replaces `forward` on the instance, not on the class. A call that asks for no loss, or for a loss and its
logits (evaluation), runs the model's own forward unchanged: generate, evaluate, saving and loading stay as they were.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, NoReturn

import torch

from ..errors import fail
from ..loss.build import check_options
from ..loss.options import Function
from ..models.heads import head_of, unwrapped
from .fused_forward import OURS, WEIGHTS, Attachment, DistributionOutput, check_loss, targets_of, with_loss

__all__ = ["DistributionOutput", "Held", "attach", "detach", "targets_of"]

_THE_CALLS = ("bias", "low_rank", "logit_scale", "softcap", "reduction", "num_items", "ignore_index", "return_metrics")
_CHECKED_IN_CALLS = {"potential", "group", "num_groups", "features", "feature_weight", "entropy_weight", "row_weight",
                     "process_group"}  # fmt: skip


class Held:
    """Keeps FSDP2's mixed precision from casting a teacher or terms: it casts the tensors in every container of inputs
    that it knows, a store's log-probabilities among them, and does not look into this class."""

    def __init__(self, held: Any) -> None:
        self.held = held


def attach(model: Any, **terms: Any) -> Any:
    """Put the fused loss inside `model.forward`; returns the model.

        model(**batch, labels=labels).loss                      the fused cross-entropy, whatever hard_weight is
        model(**batch, labels=labels, teacher=teacher).loss     soft_weight D(teacher, model) + hard_weight CE

    model: a causal LM of transformers, inside of PEFT or not; LoRA and trainable tokens of its head and a
    `CorrectionHead` are trained, other adapters there are refused. terms: keywords of `linear_distribution_loss` for
    every call: divergence, hard_weight, soft_weight, temperature, label_smoothing, ...

    In a call: `labels` [B, T] as transformers takes them, `shift_labels` [B, T] those that are shifted already;
    teacher: any teacher of `linear_distribution_loss`, whose row (b, t) is its distribution over token t + 1, so that
    rows line up with input_ids; num_items_in_batch: what the sum is divided by (Trainer gives it under gradient
    accumulation); return_logits=True: the logits too; distribution_terms: a `dft_kernels.terms.Delayed`, which the
    loss then has and is told of this batch, or an `OnPolicy`, which then is the loss, of labels that the model drew;
    soft_weight, hard_weight: of this call, with a teacher, None: those of `terms`. Without labels a teacher's rows
    count wherever the attention mask has a next token. The output's `metrics` are the kernel's. In evaluation mode
    labels alone take the model's own path.

    The model's own forward runs, without the product with its head and with the fused loss as its `loss_function`. What
    that forward adds to its loss is added here too: with output_router_logits=True the router's loss, times the model's
    coefficient, whatever the teacher and num_items_in_batch are, as in transformers.

    Under data parallelism attach first and wrap then (DDP, FSDP2, accelerate's prepare), and call the wrapper:
    `ddp.module(**batch)` goes around it, and gradients stay this process's without an error. The loss reads the head
    after the backbone ran: FSDP2 has to keep it in the root's unit or group it with the final norm, as accelerate does.

    Raises ValueError, TypeError for terms that are wrong whatever the call, and for a model whose logits are not a
    scale and a softcap of its head's output, whose own loss is not the next token's cross-entropy, or whose head has
    more to train than weight and bias: checked on a few tokens, in training and evaluation mode. A call that asks for a
    loss raises where a forward that was set after attach computes another one instead of calling the attached one.
    """
    causal = _causal(model)
    if "_dft_kernels" in causal.__dict__:
        _fail("model", "be without an attachment", "one that has one", "Call detach(model) first")
    for name in _THE_CALLS:
        if name in terms:
            _fail(
                name, "be left to the model and the call", "one", "The head's own are used; losses are means of tokens"
            )
    if "teacher" in terms:
        _fail("teacher", "be given in each call", "one", "Call model(**batch, labels=labels, teacher=teacher)")
    plain = {name: value for name, value in terms.items() if name not in _CHECKED_IN_CALLS}
    check_options(Function("attach"), plain, torch.zeros(1, 2))
    head = head_of(causal, adapted=True)._replace(weight=None, bias=None)
    original, accepts = causal.__dict__.get("forward"), causal.__dict__.get("accepts_loss_kwargs")
    attachment = Attachment(original, accepts, inspect.signature(causal.forward), head, {})
    check_loss(causal, attachment)
    attachment.terms = terms
    causal.__dict__["_dft_kernels"] = attachment
    causal.accepts_loss_kwargs = True  # Trainer then gives num_items_in_batch, and divides by nothing itself
    # bound, so that a copy of the model binds its own
    causal.forward = types.MethodType(_forward(attachment.signature), causal)
    attachment.hooks = [
        causal.register_forward_pre_hook(_before),
        causal.register_forward_hook(_after, with_kwargs=True),
    ]
    return model


def detach(model: Any) -> Any:
    """Give the model its own forward back, without what has replaced the attached one since; returns the model."""
    causal = _causal(model)
    attachment = causal.__dict__.pop("_dft_kernels", None)
    if attachment is None:
        _fail("model", "be attached", "one that is not", "Call attach(model) first")
    for hook in attachment.hooks:
        hook.remove()
    for name, value in (("forward", attachment.original), ("accepts_loss_kwargs", attachment.accepts)):
        causal.__dict__.pop(name, None)
        if value is not None:
            causal.__dict__[name] = value
    return model


def _causal(model: Any) -> Any:
    if isinstance(getattr(model, "module", None), torch.nn.Module):  # some of them pass on what they are asked for
        remedy = "Call attach(model) before it is wrapped, or on the wrapper's .module"
        _fail("model", "be what is inside of a wrapper", type(model).__name__, remedy)
    inner, remedy = unwrapped(model), "Pass what AutoModelForCausalLM loads"
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        _fail("model", "be a causal LM of transformers", type(model).__name__, remedy)
    if getattr(inner.config, "is_encoder_decoder", False):
        got = f"{type(inner).__name__}, an encoder-decoder"
        _fail("model", "be a causal LM of transformers", got, remedy)
    return inner


def _forward(signature: inspect.Signature) -> Any:
    """A function of that signature and our own keywords: what inspects a model's forward sees them."""

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return _call(self, arguments, named)

    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "return_logits" else None)
        for name in OURS
        if name not in signature.parameters
    ]
    own = list(signature.parameters.values())
    rest = [own.pop()] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *own, *more, *rest])  # type: ignore[attr-defined]
    return forward


def _call(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    attachment: Attachment = model.__dict__["_dft_kernels"]
    attachment.reached = True
    ours = {name: named.pop(name, None) for name in OURS}
    ours.update({name: value.held for name, value in ours.items() if isinstance(value, Held)})
    for name in WEIGHTS:
        if ours["teacher"] is None and ours[name] is not None:
            _fail("teacher", f"be given with {name}={ours[name]} in a call", "None", "Without one it is cross-entropy")
    if _asks(model, given := {**attachment.named(arguments, named), **ours}):
        return with_loss(model, attachment, given, ours)
    items = ours["num_items_in_batch"]
    if items is not None and (attachment.takes_more or "num_items_in_batch" in attachment.signature.parameters):
        named = {**named, "num_items_in_batch": items}
    return attachment.own(model)(*arguments, **named)


def _asks(model: Any, given: dict[str, Any]) -> bool:
    """Whether a call asks for the fused loss: in evaluation mode labels alone take the model's own path."""
    needed = [given.get(name) is not None for name in ("teacher", "shift_labels")]
    return any(needed) or (model.training and given.get("labels") is not None)


def _before(model: Any, _: Any) -> None:
    model.__dict__["_dft_kernels"].reached = False


def _after(model: Any, arguments: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
    """Refuse a call whose loss was not computed here: another forward has replaced the attached one, and does not call
    it, as a wrapper does (autocast, torch.compile)."""
    attachment: Attachment = model.__dict__["_dft_kernels"]
    if not attachment.reached and _asks(model, attachment.named(arguments, named)):
        other: Any = getattr(model.forward, "__func__", model.forward)
        code = getattr(other, "__code__", None)
        got = f"{getattr(other, '__module__', '')}.{getattr(other, '__qualname__', type(other).__name__)}"
        if code is not None:  # functools.wraps gives a replacement the name of what it replaces
            got = f"{other.__globals__['__name__']}.{code.co_name}"
        remedy = "Use one of the two: detach(model), or leave out what replaces its forward after attach"
        if got.startswith("trl."):
            remedy += ". For TRL's trainers leave out attach and call dft_kernels.training.trl.fuse(trainer)"
        _fail("model.forward", "call the attached forward where a loss is asked for", f"{got}, which does not", remedy)


def _fail(argument: str, relation: str, got: object, remedy: str) -> NoReturn:
    fail("attach", argument, relation, got, remedy)
