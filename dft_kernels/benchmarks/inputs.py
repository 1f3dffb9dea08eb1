"""The inputs of a loss: random ones, and those of a real model, which real.py makes and keeps in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import Source
from .problems import RANDOM, Case

SPREAD = 3.0  # of the logits about their token's log-frequency, which falls as Zipf's law
LIKENESS = 0.9  # correlation of the teacher's logits with the model's


@dataclass
class Inputs:
    """Inputs of a loss: a model, labels, and a teacher that resembles the model."""

    hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H], requires grad
    target: Tensor  # [N]
    teacher_hidden: Tensor  # [N, H]
    teacher_weight: Tensor  # [V, H]
    teacher_logits: Tensor | None = field(default=None)  # [N, V], for stored_kl
    teacher_probabilities: Tensor | None = field(default=None)  # [N, V], the same as peers take it

    @classmethod
    def make(cls, case: Case, seed: int, file: Path | None = None) -> Inputs:
        """Of a case: random, or the tensors of a file of real.py, from another row on for each seed."""
        if case.inputs == RANDOM:
            made = cls._random(case, seed)
        else:
            assert file is not None
            made = cls._real(case, seed, file)
        if case.loss == "stored_kl":
            made.teacher_logits = made.teacher_hidden @ made.teacher_weight.t()
            made.teacher_probabilities = torch.empty_like(made.teacher_logits)
            for part, logits in zip(made.teacher_probabilities.split(256), made.teacher_logits.split(256), strict=True):
                part.copy_(logits.float().softmax(-1))
        made.hidden.requires_grad_()
        made.weight.requires_grad_()
        return made

    @classmethod
    def _real(cls, case: Case, seed: int, file: Path) -> Inputs:
        source, (n, h, v) = Source("bench", file, "Delete it; it is made again"), case.shape
        teacher = f"teacher {case.distance:g}" if case.distance else "hidden"
        with source.tensors() as opened:
            held = min(n, opened.get_slice("hidden").get_shape()[0])
            shapes = {"hidden": [held, h], "weight": [v, h], "target": [held], teacher: [held, h]}
            for name, shape in shapes.items():
                source.tensor(opened, name, shape, torch.int64 if name == "target" else case.torch_dtype)
            tensors = {name: opened.get_tensor(name) for name in shapes}
        rows = (torch.arange(n) + seed * 97) % held

        def picked(name: str) -> Tensor:
            return tensors[name][rows].to(case.device)

        weight = tensors["weight"].to(case.device)
        # the teacher's head is a copy, so that no cache holds it for having held the model's
        return cls(picked("hidden"), weight, picked("target"), picked(teacher), weight.clone())

    @classmethod
    def _random(cls, case: Case, seed: int) -> Inputs:
        """Logits are a token's log-frequency, and about it normal: peers that leave small gradients out, or
        sort the vocabulary, would do all or nothing on uniform rows, and not what they do on a trained model's. The
        entropy is about 3 nats at V 49152, the forward KL about 1."""
        n, h, v = case.shape
        generator = torch.Generator(device=case.device).manual_seed(seed)
        dtype = case.torch_dtype

        def normal(rows: int, scale: float) -> Tensor:
            x = torch.randn(rows, h, generator=generator, device=case.device, dtype=dtype)
            return x if scale == 1.0 else x.mul_(scale)

        def alike(x: Tensor, scale: float) -> Tensor:
            other = normal(len(x), scale * math.sqrt(1 - LIKENESS))
            return other.add_(x, alpha=math.sqrt(LIKENESS))

        scale = SPREAD / math.sqrt(h)
        hidden, weight = normal(n, 1.0), normal(v, scale)
        made = cls(
            hidden,
            weight,
            torch.randint(0, v, (n,), generator=generator, device=case.device),
            alike(hidden, 1.0),
            alike(weight, scale),
        )
        frequency = -torch.arange(2, v + 2, device=case.device, dtype=torch.float32).log()
        for states, head in ((hidden, weight), (made.teacher_hidden, made.teacher_weight)):
            states[:, 0], head[:, 0] = 1.0, frequency.to(dtype)
        return made

    def first(self, rows: int) -> Inputs:
        """The same problem of the first rows alone."""
        stored = (self.teacher_logits, self.teacher_probabilities)
        return Inputs(
            self.hidden.detach()[:rows].requires_grad_(),
            self.weight.detach().requires_grad_(),
            self.target[:rows],
            self.teacher_hidden[:rows],
            self.teacher_weight,
            *(None if x is None else x[:rows] for x in stored),
        )

    def detached(self) -> Inputs:
        """The same without gradients: some peers look at the tensors, not at the mode."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def forget_gradients(self) -> None:
        """Frees what the last call returned."""
        self.hidden.grad = self.weight.grad = None
