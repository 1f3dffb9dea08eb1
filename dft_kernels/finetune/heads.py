"""The head of a transformers causal LM, as the losses take it: checked against the model's own logits."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..teachers import Head

_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # names that configurations give the scale
_DIVIDES = ("logits_scaling",)


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, H] that the model's head multiplies."""
    states: Tensor = model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
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


@torch.no_grad()
def head_of(model: Any) -> Head:
    """weight [V, H], bias, logit_scale and softcap such that cap(logit_scale * (hidden @ weight.T + bias)) are the
    logits of `model`, proven on a few tokens. ValueError where they are not: what the model does to its logits beyond
    a scale and a softcap is not served."""
    layer = output_layer(model)
    weight = getattr(layer, "weight", None)
    if weight is not None and (found := parted(layer)) is not None:
        remedy = "Call attach before the model is sharded; a head split by ZeRO-3 or tensor parallelism is not served"
        _fail(model, "all of its head in this process", found, remedy)
    if weight is None or weight.ndim != 2:
        _fail(
            model, "a linear output embedding", type(layer).__name__, "Models without an lm_head [V, H] are not served"
        )
    if type(layer).__module__.startswith("peft."):
        _fail(model, "a plain lm_head", "one with an adapter", "Merge it first: model.merge_and_unload()")
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
        ours = _logits(hidden_states(model, ids), head)
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


def _logits(hidden: Tensor, head: Head) -> Tensor:
    assert head.weight is not None
    bias = None if head.bias is None else head.bias.double()
    z = torch.nn.functional.linear(hidden.double(), head.weight.double(), bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _fail(model: Any, relation: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"head_of: {type(model).__name__} must have {relation}, got {got}. {remedy}.")
