"""A student, its sequences and its step: what training towards a teacher needs beside the loss.

The loss is a function of hidden states, the head and labels, so any of them fits: ours, or an eager one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .heads import hidden_states

# hidden [B, T, H], head weight [V, H], labels [B, T], what the loss makes its teacher of -> scalar
Loss = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


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


class Trainee:
    """A model, its optimiser and one loss; keeps the loss and the seconds spent in it for every step."""

    def __init__(self, model: Any, loss: Loss, learning_rate: float, warmup: int) -> None:
        """warmup: steps over which the learning rate rises linearly. Adam's eps lies above the rounding of a
        small gradient: at 1e-8 it steps by the sign of what is noise, and equal runs drift apart by 1 %."""
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, eps=1e-5, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0 / warmup, total_iters=warmup - 1)
        self.losses: list[float] = []
        self.seconds: list[float] = []  # loss forward and backward, without the backbone

    @property
    def head(self) -> Tensor:
        """The head's weight [V, H]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def step(self, ids: Tensor, labels: Tensor, teacher: Any) -> None:
        """One optimiser step. The graph is cut between backbone and loss, so that the loss is timed alone; the
        gradients are those of the whole."""
        hidden = hidden_states(self.model, ids)
        leaf = hidden.detach().requires_grad_()
        started = _now(leaf)
        loss = self.loss(leaf, self.head, labels, teacher)
        loss.backward()
        self.seconds.append(_now(leaf) - started)
        hidden.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
