"""A low-rank adapter of the head that is trained alone and saved in a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .heads import CORRECTION, output_layer

CORRECTION_FILE = "correction.safetensors"  # in a folder of `dft-kernels train`
_FORMAT = "dft_kernels correction 1"


class CorrectionHead(nn.Module):
    """A low-rank map from the last hidden state to a correction of the logits: z = W h + U (A h) + b.

    down: A [r, H], drawn as nn.Linear draws; up: U [V, r], zero at first, so that the model begins as it was, and b [V]
    where asked for. It acts before the model's own logit scale and softcap. Parameters are fp32 whatever the model is;
    the correction is added in the logits' dtype. Trained through `attach` it costs 2 N r V a product; where nothing
    else requires grad, no gradient of head or backbone is computed.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, vocab_size, bias=bias, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """U (A hidden) + b [..., V]"""
        out: Tensor = self.up(self.down(hidden.to(self.down.weight.dtype)))
        return out


def add_correction(model: Any, rank: int = 16, bias: bool = False) -> CorrectionHead:
    """Freeze `model`, a causal LM of transformers, and give its head a `CorrectionHead`, which is returned.

    It is part of the logits in forward, generate and evaluation; `attach(model)` trains it. `save_pretrained` saves it
    with the model, `save_correction` alone. ValueError where the head has an adapter already.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        _fail("add_correction", "rank must be an int of at least 1", rank, "16 is a start")
    layer = output_layer(model)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2:
        _fail("add_correction", "model must have an lm_head [V, H]", type(layer).__name__, "Others are not served")
    if hasattr(layer, CORRECTION) or type(layer).__module__.startswith("peft."):
        got = "one with an adapter"
        _fail("add_correction", "model must have a plain lm_head", got, "remove_correction(model), or merge it")
    model.requires_grad_(False)
    correction = CorrectionHead(weight.shape[1], weight.shape[0], rank, bias).to(weight.device)
    layer.add_module(CORRECTION, correction)
    layer.register_forward_hook(_corrected)
    return correction


def remove_correction(model: Any) -> None:
    """Remove the correction; parameters that `add_correction` froze stay frozen."""
    layer = output_layer(model)
    _correction_of(layer, "remove_correction")
    delattr(layer, CORRECTION)
    for number, hook in list(layer._forward_hooks.items()):
        if hook is _corrected:
            del layer._forward_hooks[number]


def save_correction(model: Any, file: str | Path) -> None:
    """Write the model's correction, and nothing else, as safetensors."""
    from safetensors.torch import save_file

    correction = _correction_of(output_layer(model), "save_correction")
    vocab, rank = correction.up.weight.shape
    about = {"format": _FORMAT, "V": vocab, "H": correction.down.weight.shape[1], "rank": rank}
    tensors = {name: value.detach().cpu().contiguous() for name, value in correction.state_dict().items()}
    part = Path(f"{file}.part")
    save_file(tensors, part, metadata={"about": json.dumps(about)})
    part.replace(file)


def load_correction(model: Any, file: str | Path) -> CorrectionHead:
    """`add_correction` with what `save_correction` wrote. ValueError for another file or a head of other sizes, before
    the model is touched."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("about", "{}"))
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        _fail("load_correction", f"{file} must be a whole file of save_correction", error, "Save it again")
    if about.get("format") != _FORMAT:
        got = about.get("format", "another safetensors file")
        _fail("load_correction", f"{file} must hold a correction ({_FORMAT})", got, "save_correction writes one")
    weight = output_layer(model).weight
    if (about["V"], about["H"]) != tuple(weight.shape):
        sizes = f"{file} must fit the head's V {weight.shape[0]}, H {weight.shape[1]}"
        _fail("load_correction", sizes, f"V {about['V']}, H {about['H']}", "It was trained for another model")
    correction = add_correction(model, about["rank"], "up.bias" in state)
    correction.load_state_dict(state)
    return correction


def _corrected(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + getattr(layer, CORRECTION)(arguments[0]).to(output.dtype)


def _correction_of(layer: Any, function: str) -> CorrectionHead:
    found = getattr(layer, CORRECTION, None)
    if not isinstance(found, CorrectionHead):
        _fail(function, "model must have a correction", "none", "Call add_correction(model) first")
    return found


def _fail(function: str, relation: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"{function}: {relation}, got {got}. {remedy}.")
