"""What is measured: the losses, the shapes, the presets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


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


RANDOM = "random"
REAL = {"smollm2": (576, 49152)}  # models whose hidden states are inputs too: H, V
TEXT_ROWS = 8192  # that such a model is run over; beyond them rows repeat
DISTANCES = (0.4, 0.01, 0.001)  # of their teachers from them, forward KL in nats


class Case(NamedTuple):
    """One comparison: everything in it is measured by every implementation."""

    shape: Shape
    dtype: str  # "bfloat16", "float16", "float32"
    loss: str  # of LOSSES
    part: str  # of PARTS
    device: str  # "cpu", "cuda"
    inputs: str = RANDOM  # or a model of `REAL`, whose hidden states over text they are
    distance: float = 0.0  # of `DISTANCES`: about what KL(teacher || model) is; 0: the inputs have one teacher, or none

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

    def needs_no_less_than(self, other: Case) -> bool:
        """Whether whoever computes this loss has at least as much to do as for `other`."""
        kind = (self.dtype, self.part, self.device) == (other.dtype, other.part, other.device)
        larger = all(mine >= its for mine, its in zip(self.shape, other.shape, strict=True))
        return kind and larger and self.products() >= other.products()

    def input_bytes(self) -> int:
        """Of one set of inputs."""
        n, h, v = self.shape
        stored = 2 * n * v if self.loss == "stored_kl" else 0
        return (2 * (n + v) * h + stored) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        part = "" if self.part == "both" else f", {self.part} only"
        real = "" if self.inputs == RANDOM else f", hidden states of {self.inputs}"
        near = f", a teacher at KL {self.distance:g}" if self.distance else ""
        return f"{LOSSES[self.loss].title}{part}: {self.shape}, {self.dtype}, {self.device}{real}{near}"


_SMOLLM2 = Shape(4096, 576, 49152)
_LLAMA3 = Shape(8192, 4096, 128256)
_QWEN3 = Shape(8192, 4096, 151936)
_GEMMA3 = (Shape(8192, 640, 262144), Shape(8192, 2560, 262144))
_EDGES = (  # each size swept with the others small; what takes too long for a smaller problem comes after it
    Shape(1, 8, 2),
    *(Shape(n, 256, 1024) for n in (1, 16, 256, 2048, 16384, 131072)),
    *(Shape(64, 256, v) for v in (2, 64, 1024, 16384, 262144)),
    *(Shape(64, h, 1024) for h in (8, 64, 1024, 8192)),
)
_MAIN = ("cross_entropy", "forward_kl", "jensen_shannon")


LIMIT = 30.0  # seconds of a call


class Preset(NamedTuple):
    """Cases under a name."""

    about: str
    shapes: tuple[Shape, ...]
    losses: tuple[str, ...] = tuple(LOSSES)
    dtypes: tuple[str, ...] = ("bfloat16",)
    rounds: int = 5
    sweeps: tuple[str, ...] = ()  # over dimensions of the first shape
    errors: bool = True  # whether they are measured
    limit: float = LIMIT


PRESETS = {
    "quick": Preset("a small SmolLM2 batch, two losses", (Shape(256, *_SMOLLM2[1:]),), _MAIN[:2], rounds=3, limit=3.0),
    "smollm2": Preset("SmolLM2-135M's head, every loss", (_SMOLLM2,)),
    "llama3-8b": Preset("Llama 3 8B's head, every loss", (_LLAMA3,)),
    "qwen": Preset("Qwen3 8B's head", (_QWEN3,)),
    "gemma": Preset("Gemma 3 270M's and 4B's heads", _GEMMA3, _MAIN),
    "edges": Preset(
        "N 1 to 131072, V 2 to 262144, H 8 to 8192: time and memory of cross-entropy and forward KL",
        _EDGES,
        ("cross_entropy", "forward_kl"),
        rounds=3,
        errors=False,
        limit=10.0,
    ),
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
