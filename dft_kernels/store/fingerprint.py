"""Hashes that identify a tokenizer, a model, or a list of sequences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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


def sequences_fingerprint(sequences: Sequence[Tensor], counts: Sequence[Tensor] | None = None) -> str:
    """sha256 of token sequences in their order, and of which of their tokens are labels: lengths, ids, marks."""
    found = hashlib.sha256(b"all" if counts is None else b"masked")
    for number, ids in enumerate(sequences):
        found.update(len(ids).to_bytes(8, "little"))
        found.update(ids.to("cpu", torch.int32).numpy().tobytes())
        if counts is not None:
            found.update(counts[number].to("cpu", torch.uint8).numpy().tobytes())
    return found.hexdigest()
