"""What is measured: the losses, the shapes, the presets, and the random inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """A loss that implementations may have, and the products [N, H] x [H, V] that it cannot do without."""

    title: str
    forward: int
    backward: int


LOSSES = {
    "cross_entropy": Loss("cross-entropy", 1, 2),
    "forward_kl": Loss("forward KL", 2, 2),  # teachers are a head of their own, but for stored_kl
    "reverse_kl": Loss("reverse KL", 2, 2),
    "jensen_shannon": Loss("JSD", 2, 2),
    "ce_and_kl": Loss("KL + ½ CE", 2, 2),
    "stored_kl": Loss("KL to stored [N, V]", 1, 2),
}
HARD_WEIGHT = 0.5  # of the cross-entropy in ce_and_kl
PARTS = ("both", "forward", "backward")


class Shape(NamedTuple):
    """N rows, hidden size H, vocabulary V."""

    n: int
    h: int
    v: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "N,H,V"."""
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"bench: shape must be three positive integers N,H,V, got {text!r}. Try 4096,576,49152.")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"N {self.n}, H {self.h}, V {self.v}"


class Case(NamedTuple):
    """One comparison: everything in it is measured by every implementation."""

    shape: Shape
    dtype: str  # "bfloat16", "float16", "float32"
    loss: str  # of LOSSES
    part: str  # of PARTS
    device: str  # "cpu", "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def products(self) -> int:
        """Of the floor."""
        loss = LOSSES[self.loss]
        return {"forward": loss.forward, "backward": loss.backward, "both": loss.forward + loss.backward}[self.part]

    def flops(self) -> float:
        """Of the floor: 2 N H V a product."""
        return 2.0 * math.prod(self.shape) * self.products()

    def compulsory_bytes(self) -> float:
        """What must move to and from memory if logits never do: operands read once, gradients written once."""
        n, h, v = self.shape
        heads = 1 if self.part == "backward" else LOSSES[self.loss].forward
        gradients = 0 if self.part == "forward" else 1
        stored = n * v if self.loss == "stored_kl" and self.part != "backward" else 0
        return ((heads + gradients) * (n + v) * h + stored) * self.torch_dtype.itemsize

    def input_bytes(self) -> int:
        """Of one set of inputs."""
        n, h, v = self.shape
        stored = 2 * n * v if self.loss == "stored_kl" else 0
        return (2 * (n + v) * h + stored) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        part = "" if self.part == "both" else f", {self.part} only"
        return f"{LOSSES[self.loss].title}{part}: {self.shape}, {self.dtype}, {self.device}"


_SMOLLM2 = Shape(4096, 576, 49152)
_LLAMA3 = Shape(8192, 4096, 128256)
_QWEN3 = Shape(8192, 4096, 151936)
_GEMMA3 = (Shape(8192, 640, 262144), Shape(8192, 2560, 262144))
_MAIN = ("cross_entropy", "forward_kl", "jensen_shannon")


class Preset(NamedTuple):
    """Cases under a name."""

    about: str
    shapes: tuple[Shape, ...]
    losses: tuple[str, ...] = tuple(LOSSES)
    dtypes: tuple[str, ...] = ("bfloat16",)
    rounds: int = 5
    sweeps: tuple[str, ...] = ()  # over dimensions of the first shape


PRESETS = {
    "quick": Preset("a small SmolLM2 batch, three losses", (Shape(256, *_SMOLLM2[1:]),), _MAIN, rounds=3),
    "smollm2": Preset("SmolLM2-135M's head, every loss", (_SMOLLM2,)),
    "llama3-8b": Preset("Llama 3 8B's head, every loss", (_LLAMA3,)),
    "qwen": Preset("Qwen3 8B's head", (_QWEN3,)),
    "gemma": Preset("Gemma 3 270M's and 4B's heads", _GEMMA3, _MAIN),
    "full": Preset(
        "every head above, then N, V and H swept", (_LLAMA3, _SMOLLM2, _QWEN3, *_GEMMA3), sweeps=("n", "v", "h")
    ),
}
SWEEPS = {
    "n": tuple(512 << i for i in range(8)),  # to 64k
    "v": (32000, 49152, 65536, 128256, 151936, 262144),
    "h": (512, 1024, 2048, 4096, 8192),
}


def sweep(dimension: str, base: Shape) -> list[Shape]:
    """Shapes that differ from `base` in one dimension."""
    return [base._replace(**{dimension: size}) for size in SWEEPS[dimension]]


SPREAD = 3.0  # of the logits about their token's log-frequency, which falls as Zipf's law
LIKENESS = 0.9  # correlation of the teacher's logits with the model's


@dataclass
class Inputs:
    """Random inputs of a loss: a model, labels, and a teacher that resembles the model."""

    hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H], requires grad
    target: Tensor  # [N]
    teacher_hidden: Tensor  # [N, H]
    teacher_weight: Tensor  # [V, H]
    teacher_logits: Tensor | None = field(default=None)  # [N, V], for stored_kl
    teacher_probabilities: Tensor | None = field(default=None)  # [N, V], the same as peers take it

    @classmethod
    def make(cls, case: Case, seed: int) -> Inputs:
        """Of a case. Logits are a token's log-frequency, and about it normal: peers that leave small gradients out, or
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
        if case.loss == "stored_kl":
            made.teacher_logits = made.teacher_hidden @ made.teacher_weight.t()
            made.teacher_probabilities = torch.empty_like(made.teacher_logits)
            for part, logits in zip(made.teacher_probabilities.split(256), made.teacher_logits.split(256), strict=True):
                part.copy_(logits.float().softmax(-1))
        hidden.requires_grad_()
        weight.requires_grad_()
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
