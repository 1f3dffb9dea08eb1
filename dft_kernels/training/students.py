"""A student of a model, and its sequences."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def every_second_layer(model: Any) -> Any:
    """A student of half the depth: a copy of `model` with layers 0, 2, 4, ..., embeddings and head included."""
    student = copy.deepcopy(model)
    layers = student.base_model.layers
    student.base_model.layers = type(layers)(layers[::2])
    for number, layer in enumerate(student.base_model.layers):
        layer.self_attn.layer_idx = number
    student.config.num_hidden_layers = len(student.base_model.layers)
    return student


def pack(texts: list[str], tokenizer: Any, length: int) -> Tensor:
    """The texts' tokens in order, an end-of-text token after each, cut into sequences [n, length]; the rest of
    fewer than `length` tokens is dropped."""
    if tokenizer.eos_token_id is None:
        raise ValueError("pack: the tokenizer must have an end-of-text token, got none. Set tokenizer.eos_token.")
    ids = [
        i
        for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for i in (*row, tokenizer.eos_token_id)
    ]
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
