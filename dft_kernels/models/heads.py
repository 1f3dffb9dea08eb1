"""The head of a transformers causal LM, as the losses take it: checked against the model's own logits."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..teachers.contract import Head

_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # names that configurations give the scale
_DIVIDES = ("logits_scaling",)
CORRECTION = "correction"  # the name of a `CorrectionHead` in the head's layer


def unwrapped(model: Any) -> Any:
    """The causal LM inside of PEFT, whose own `base_model` is no backbone; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
    """The last hidden states [B, T, H] that the model's head multiplies. more: of its forward, as position_ids."""
    out = unwrapped(model).base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **more)
    states: Tensor = out.last_hidden_state
    return states


def output_layer(model: Any) -> Any:
    """The layer whose weight [V, H] and bias make the logits; of PEFT's modules_to_save the copy that is trained."""
    layer = model.get_output_embeddings()
    trained = getattr(layer, "modules_to_save", None)
    return layer if trained is None else trained[layer.active_adapter]


def parted(layer: Any) -> str | None:
    """How the layer's weight is split over processes, None where this one has all of it."""
    weight = layer.weight
    if hasattr(weight, "full_tensor"):  # a DTensor, told without importing torch.distributed
        return f"a {type(weight).__name__} {list(weight.placements)}"
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        return "a parameter that ZeRO-3 has partitioned"
    if isinstance(layer, torch.nn.Linear) and weight.ndim == 1:
        return "a flat part of it, as FSDP1 keeps it"
    return None


def projection(layer: Any, hidden: Tensor) -> dict[str, Any]:
    """weight, bias and low_rank of `linear_distribution_loss` that give this layer's output of `hidden` [..., H], with
    the gradients of all that it trains: its adapters are LoRA's, as PEFT would run them now, and a `CorrectionHead`.
    They are multiplied in hidden's dtype, whatever theirs is."""
    parts: list[tuple[Any, Any, float, Any]] = []  # A, B, scale, dropout
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
    if not adapted and (foreign or hasattr(layer, CORRECTION)):
        _fail(
            model, "a plain lm_head", "one with an adapter", "Merge it first (model.merge_and_unload()) or take it away"
        )
    variants = sorted({type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()})
    if variants or (foreign and not (hasattr(layer, "lora_A") and hasattr(layer, "lora_B"))):
        got = ", ".join(variants) or type(layer).__qualname__
        _fail(model, "a plain lm_head, or one adapted by LoRA", got, "Use LoRA without variants there, or merge it")


@torch.no_grad()
def head_of(model: Any, adapted: bool = False) -> Head:
    """weight [V, H], bias, logit_scale and softcap such that cap(logit_scale * (hidden @ weight.T + bias)) are the
    logits of `model`, proven on a few tokens. ValueError where they are not: what the model does to its logits beyond
    a scale and a softcap is not served. adapted: `projection` of its layer is used, so that adapters are admitted."""
    layer = output_layer(model)
    weight = getattr(layer, "weight", None)
    if weight is not None and (found := parted(layer)) is not None:
        remedy = "Call attach before the model is sharded; a head split by ZeRO-3 or tensor parallelism is not served"
        _fail(model, "all of its head in this process", found, remedy)
    if weight is None or weight.ndim != 2:
        _fail(
            model, "a linear output embedding", type(layer).__name__, "Models without an lm_head [V, H] are not served"
        )
    _check_adapters(model, layer, adapted)
    config = model.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIES:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVIDES:
        scale /= getattr(config, name, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(weight.detach(), _detached(getattr(layer, "bias", None)), scale, softcap)
    training = model.training
    model.eval()
    try:
        ids = torch.arange(1, 6, device=weight.device)[None] % weight.shape[0]
        theirs = model(input_ids=ids, use_cache=False).logits.double()
        ours = _logits(layer, hidden_states(model, ids), head)
    finally:
        model.train(training)
    if theirs.shape != ours.shape:
        _fail(model, f"logits {list(ours.shape)}", list(theirs.shape), "This model's head is not its whole output")
    error = float((theirs - ours).norm() / ours.norm().clamp_min(1e-30))
    if not error < 8 * torch.finfo(weight.dtype).eps ** 0.75:
        got = f"a relative difference of {error:.1e}"
        _fail(
            model, "the logits that its hidden states and head give", got, "It changes its logits in a way unknown here"
        )
    return head


def _logits(layer: Any, hidden: Tensor, head: Head) -> Tensor:
    given = projection(layer, hidden)
    states = hidden.double()
    z = torch.cat([states @ some.double().t() for some in given["weight"].split(8192)], dim=-1)  # no second head
    if given["bias"] is not None:
        z += given["bias"].double()
    if "low_rank" in given:
        down, up = given["low_rank"]
        z += down.double() @ up.double().t()
    z *= head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _fail(model: Any, relation: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"head_of: {type(model).__name__} must have {relation}, got {got}. {remedy}.")
