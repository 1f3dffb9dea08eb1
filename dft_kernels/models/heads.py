"""The head of a transformers causal LM, as the losses take it: checked against the model's own logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import fail
from ..teachers.contract import Head

_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # names that configurations give the scale
_DIVIDES = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
CORRECTION = "correction"  # the name of a `CorrectionHead` in the head's layer


def unwrapped(model: Any) -> Any:
    """The causal LM inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_positions(model: Any, longest: int, function: str, argument: str, relation: str, remedy: str) -> None:
    """ValueError for a sequence of more tokens than a model, or its configuration, has positions: "ARGUMENT must
    RELATION at most ..."."""
    config = getattr(model, "config", model)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest > most:
        fail(
            function,
            argument,
            f"{relation} at most {most} tokens, the model's positions",
            f"a sequence of {longest}",
            remedy,
        )


def check_ids(model: Any, highest: int, function: str, argument: str, of: str = "model") -> None:
    """ValueError for a token that a model, or its configuration, has no embedding of: its tokenizer is another's."""
    vocab = getattr(getattr(model, "config", model).get_text_config(), "vocab_size", None)
    if vocab is not None and highest >= vocab:
        remedy = f"Put the {of}'s own tokenizer into its folder, or name another {of}"
        fail(function, argument, f"be of ids below {vocab}, the {of}'s vocab_size", highest, remedy)


class Tap(torch.nn.Module):
    """Replaces the head during one forward pass: records the hidden states that the head would multiply and returns
    logits of no rows [B, 0, V]. Other attributes are those of the head."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule
        self.inputs: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        self.inputs.append(hidden)
        return hidden.new_empty(*hidden.shape[:-2], 0, _base_weight(self.layer).shape[0])

    def hidden(self, model: Any, rows: tuple[int, ...] | None = None) -> Tensor:
        """What the head would have multiplied [B, T, H], where it would have run once, for every token of [B, T]."""
        remedy = "A forward that reads lm_head.weight itself, or that has several heads, is not served"
        if len(self.inputs) != 1:
            _fail(model, "a forward that calls its head once", f"{len(self.inputs)} calls", remedy)
        states = self.inputs[0]
        if rows is not None and states.shape[:-1] != rows:
            _fail(model, f"a row of hidden states for each token of {list(rows)}", list(states.shape), remedy)
        return states


@contextmanager
def tapped(model: Any) -> Iterator[Tap]:
    """Run the model's forward with a `Tap` in place of its head: all that its forward does is done, except the
    product with the head. Works on any forward that calls its head as a module, whatever it returns."""
    layer = model.get_output_embeddings()
    tap = Tap(layer)
    parents = [model] if layer in model._modules.values() else model.modules()
    slots = [(parent._modules, name) for parent in parents for name, child in parent._modules.items() if child is layer]
    try:
        for modules, name in slots:
            modules[name] = tap
        yield tap
    finally:
        for modules, name in slots:
            modules[name] = layer


@contextmanager
def loss_replaced(model: Any, loss: Callable[..., Any]) -> Iterator[None]:
    """Have the model's forward call `loss` where it calls `self.loss_function`: what the forward adds to the result,
    as a router's loss with its coefficient, is added still."""
    kept = model.__dict__.get("_loss_function")
    model.loss_function = loss
    try:
        yield
    finally:
        if kept is None:
            del model._loss_function
        else:
            model.loss_function = kept


def attempt(model: Any, doing: str, forward: Callable[..., Any], **given: Any) -> Any:
    """forward(**given); an error of the model's code becomes one that says what cannot be done with this model."""
    try:
        return forward(**given)
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
        _fail(model, doing, got, "This model is not served as it is")


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
    """The last hidden states [B, T, H] that the model's head multiplies. more: of its forward, as position_ids."""
    causal = unwrapped(model)
    with tapped(causal) as tap:
        causal(input_ids=ids, attention_mask=attention_mask, use_cache=False, **more)
    return tap.hidden(causal, tuple(ids.shape))


def output_layer(model: Any) -> Any:
    """The layer whose weight [V, H] and bias make the logits; with PEFT's modules_to_save, its trained copy."""
    layer = model.get_output_embeddings()
    trained = getattr(layer, "modules_to_save", None)
    return layer if trained is None else trained[layer.active_adapter]


@contextmanager
def in_mode(model: Any, training: bool) -> Iterator[None]:
    """Put the model into training or evaluation mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _base_weight(layer: Any) -> Any:
    """The stored weight [V, H]: `weight` of a layer with trainable tokens is a new copy at every access."""
    return getattr(getattr(layer, "token_adapter", None), "base_layer", layer).weight


def of_fsdp(module: Any) -> bool:
    """Whether the module is a unit of FSDP2, told without importing it."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def apart(layer: Any) -> bool:
    """Whether the layer's weight is here only while the layer is called: it is a unit of FSDP2 of its own, or a module
    of ZeRO-3."""
    weight = _base_weight(layer)
    return (of_fsdp(layer) and hasattr(weight, "placements")) or hasattr(weight, "ds_id")


def called_as(layer: Any, forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """forward(hidden), within a call of the layer, whose hooks gather its weight and reduce its gradient."""
    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        return layer(hidden)
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def parted(layer: Any) -> str | None:
    """How the layer's weight is split over processes in a way that the loss does not take; None where this process has
    all of it, or its own rows under tensor parallelism."""
    weight = _base_weight(layer)
    if hasattr(weight, "placements"):  # a DTensor
        over = [placement for placement in weight.placements if not placement.is_replicate()]
        if len(over) == 1 and over[0].is_shard(0) and not of_fsdp(layer):
            return None
        return f"a {type(weight).__name__} {list(weight.placements)}"
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        return "a parameter that ZeRO-3 has partitioned"
    if isinstance(layer, torch.nn.Linear) and weight.ndim == 1:
        return "a flat part of it, as FSDP1 keeps it"
    return None


def projection(layer: Any, hidden: Tensor) -> dict[str, Any]:
    """weight, bias and low_rank of `linear_distribution_loss` that give this layer's output of `hidden` [..., H], with
    the gradients of all that it trains: its adapters are LoRA or trainable tokens, as PEFT would run them now, and a
    `CorrectionHead`. Low-rank parts are multiplied in hidden's dtype, whatever theirs is."""
    parts: list[tuple[Any, Any, float, Any]] = []  # A, B, scale, dropout
    tokens = getattr(layer, "token_adapter", None)
    adapter = layer if tokens is None else tokens
    if getattr(adapter, "disable_adapters", False) and adapter.merged:
        adapter.unmerge()  # as PEFT's forward does
    if tokens is not None:
        if tokens.disable_adapters or tokens.merged or not tokens.active_adapters:
            return {"weight": tokens.base_layer.weight, "bias": getattr(tokens.base_layer, "bias", None)}
        # rows of the weight replaced by trained ones: a copy [V, H], as in PEFT's forward, which adds no bias
        return {"weight": tokens.get_merged_weights(tokens.active_adapters), "bias": None}
    if hasattr(layer, "lora_A") and not (layer.disable_adapters or layer.merged):
        for name in (name for name in layer.active_adapters if name in layer.lora_A):
            parts.append((layer.lora_A[name], layer.lora_B[name], layer.scaling[name], layer.lora_dropout[name]))
    if hasattr(layer, CORRECTION):
        correction = getattr(layer, CORRECTION)
        parts.append((correction.down, correction.up, 1.0, torch.nn.Identity()))
    bias = getattr(layer, "bias", None)
    if not parts:
        return {"weight": layer.weight, "bias": bias}
    down = torch.cat([a(dropout(hidden.to(a.weight.dtype))).to(hidden.dtype) * s for a, _, s, dropout in parts], dim=-1)
    up = torch.cat([b.weight.to(hidden.dtype) for _, b, _, _ in parts], dim=-1)
    for _, b, scale, _ in parts:
        if b.bias is not None:
            more = b.bias.to(hidden.dtype) * scale
            bias = more if bias is None else bias + more
    return {"weight": layer.weight, "bias": bias, "low_rank": (down, up)}


def _check_adapters(model: Any, layer: Any, adapted: bool) -> None:
    foreign = type(layer).__module__.startswith("peft.")
    if hasattr(_base_weight(layer), "placements") and (foreign or hasattr(layer, CORRECTION)):
        remedy = "Merge it first, or leave the head out of the tensor parallel plan"
        _fail(model, "a plain lm_head where that lies over several processes", "one with an adapter", remedy)
    if not adapted and (foreign or hasattr(layer, CORRECTION)):
        _fail(
            model, "a plain lm_head", "one with an adapter", "Merge it first (model.merge_and_unload()) or take it away"
        )
    variants = sorted({type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()})
    tokens = isinstance(getattr(getattr(layer, "token_adapter", None), "base_layer", None), torch.nn.Linear)
    lora = hasattr(layer, "lora_A") and hasattr(layer, "lora_B")
    if variants or (foreign and not lora and not tokens):
        got = ", ".join(variants) or type(layer).__qualname__
        relation = "a plain lm_head, or one adapted by LoRA or trainable tokens"
        _fail(model, relation, got, "Use LoRA without variants there, or merge it")


@torch.no_grad()
def head_of(model: Any, adapted: bool = False) -> Head:
    """weight [V, H], bias, logit_scale and softcap such that cap(logit_scale * (hidden @ weight.T + bias)) are the
    logits of `model`, checked on a few tokens. ValueError where they are not, or where the model trains other
    parameters between `hidden` and its logits. adapted: admit adapters of the head, for a caller that reads weight and
    bias through `projection`."""
    layer = output_layer(model)
    weight = getattr(layer, "weight", None)
    if weight is not None:
        found = parted(layer)
        if found is None and hasattr(weight, "placements") and any(map(of_fsdp, model.modules())):
            found = f"a {type(weight).__name__} {list(weight.placements)} of FSDP2"
        if found is not None:
            remedy = "Call attach before the model is sharded; a head split by ZeRO-3 is not served"
            _fail(model, "all of its head in this process, or its own rows of it", found, remedy)
    if weight is None or weight.ndim != 2:
        _fail(
            model, "a linear output embedding", type(layer).__name__, "Models without an lm_head [V, H] are not served"
        )
    _check_adapters(model, layer, adapted)
    with in_mode(model, False):
        ids = torch.arange(1, 6, device=weight.device)[None] % weight.shape[0]
        theirs = _own_logits(model, ids)
        doing = "a forward that runs without the product with its head"
        states = attempt(model, doing, functools.partial(hidden_states, model, ids))
        with torch.enable_grad():
            _check_trained(model, theirs, projection(layer, states))
        product = _product(layer, states)
    if theirs.shape != product.shape:
        _fail(model, f"logits {list(product.shape)}", list(theirs.shape), "This model's head is not its whole output")
    errors = {}
    for scale, cap in _constants(model.config.get_text_config()):
        z = _finished(product, scale, cap)
        errors[float((theirs.double() - z).norm() / z.norm().clamp_min(1e-30))] = scale, cap
    error = min(errors)
    if not error < 8 * torch.finfo(weight.dtype).eps ** 0.75:
        got = f"a relative difference of {error:.1e}"
        _fail(
            model, "the logits that its hidden states and head give", got, "It changes its logits in a way unknown here"
        )
    return Head(weight.detach(), _detached(getattr(layer, "bias", None)), *errors[error])


def _constants(config: Any) -> list[tuple[float, float | None]]:
    """What logit_scale and softcap may be by the configuration: one model multiplies by what another divides by, a
    third scales its hidden states, before its head."""
    named = 1.0
    for name in _MULTIPLIES:
        named *= getattr(config, name, None) or 1.0
    for name in _DIVIDES:
        named /= getattr(config, name, None) or 1.0
    caps = [cap for name in _CAPS if (cap := getattr(config, name, None))]
    return [(scale, cap) for cap in (*caps, None) for scale in dict.fromkeys((named, 1.0, 1 / named))]


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    """The model's logits; their graph begins at the hidden states that its head multiplies."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].detach(), *given[1:]))
    try:
        with torch.enable_grad():
            given = {"input_ids": ids, "use_cache": False}
            out = attempt(model, "a forward that takes token ids alone", model, **given)
    finally:
        hook.remove()
    logits: Tensor = out.logits
    return logits


def _check_trained(model: Any, logits: Tensor, given: dict[str, Any]) -> None:
    """Refuse a parameter that the model's loss trains through its head or after it, and the fused loss would not."""
    used = [given["weight"], given["bias"], *given.get("low_rank", ())]
    missed = _leaves(logits).difference(*map(_leaves, used))
    names = sorted(name for name, parameter in model.named_parameters() if id(parameter) in missed)
    if names:
        remedy = "Freeze it (requires_grad_(False)), where its value is not to be trained"
        _fail(model, "no parameters behind its last hidden states but the head's weight and bias", names, remedy)


def _leaves(tensor: Tensor | None) -> set[int]:
    """The ids of the parameters that a gradient of `tensor` would reach."""
    if tensor is None or not tensor.requires_grad:
        return set()
    if tensor.grad_fn is None:
        return {id(tensor)}
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [child for child, _ in node.next_functions]
    return found


def _product(layer: Any, hidden: Tensor) -> Tensor:
    given = projection(layer, hidden)
    states = hidden.double()
    if hasattr(given["weight"], "placements"):
        from ..distributed.dtensor import group_over
        from ..distributed.shards import together

        part = states @ given["weight"].to_local().double().t()
        part = part if given["bias"] is None else part + given["bias"].to_local().double()
        return together(part, group_over("head_of", "weight", given["weight"], 0))
    z = torch.cat([states @ some.double().t() for some in given["weight"].split(8192)], dim=-1)  # no second head
    if given["bias"] is not None:
        z += given["bias"].double()
    if "low_rank" in given:
        down, up = given["low_rank"]
        z += down.double() @ up.double().t()
    return z


def _finished(product: Tensor, scale: float, softcap: float | None) -> Tensor:
    return product * scale if softcap is None else softcap * torch.tanh(product * scale / softcap)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _fail(model: Any, relation: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"head_of: {type(model).__name__} must have {relation}, got {got}. {remedy}.")
