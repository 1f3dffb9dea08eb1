"""Hashes that identify a tokenizer or a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of a transformers tokenizer's vocabulary: every token with its id, and the special ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    whole = json.dumps([vocabulary, sorted(tokenizer.all_special_ids)], ensure_ascii=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """sha256 of a model's parameters and buffers as they are: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
