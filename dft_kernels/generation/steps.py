"""Steps from a model's next-token distribution to the one that is drawn from: transformers' LogitsProcessors, in order.

A step takes the token ids so far [B, T], with padding on the left, and scores [B, V], log-probabilities but for a
constant of each row, -inf where a token is left out. What it returns is normalised: log-probabilities, so that beams
may add them up. None keeps anything of a sequence, so that batches, beams and several texts need no care. None waits
for the device.

What stands before what:

    style        moves probability between tokens, whatever the temperature
    temperature  a fixed one, transformers' own
    truncation   leaves tokens out: top-k, top-p, min-p, top-n-sigma
    entropy      a temperature for each row, from the entropy of what is left
    refinement   the last, for its bound is of the distribution that is drawn from

`generate` puts its own temperature, top-k, top-p and min-p behind the steps that it is given. Give it these as steps
too, and leave its own at 1, 0, 1 and None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers.generation import logits_process

from ..errors import fail

PLACES = ("style", "temperature", "truncation", "entropy", "refinement")
_OWN = {  # of transformers' own
    "TemperatureLogitsWarper": "temperature",
    **dict.fromkeys(
        ("TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper",
         "EtaLogitsWarper", "TopHLogitsWarper"), "truncation"),
}  # fmt: skip


class Step(transformers.LogitsProcessor):
    """One of ours. idle: whether its settings leave every distribution as it is; then scores are, bit for bit."""

    place: ClassVar[str]

    @property
    def idle(self) -> bool:
        """See the class."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities [B, V] in the dtype of scores, of which half precision is computed in fp32."""
        if self.idle:
            return scores
        return self.step(input_ids, scores.to(torch.promote_types(scores.dtype, torch.float32))).to(scores.dtype)

    def step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`__call__`, of settings that are not idle, on fp32 or fp64."""
        raise NotImplementedError


def place(step: Any) -> str | None:
    """Which of PLACES a step has; None: any, as a repetition penalty."""
    return step.place if isinstance(step, Step) else _OWN.get(type(step).__name__)


def ordered(
    steps: Sequence[transformers.LogitsProcessor], *, beams: int = 1, sample: bool = True
) -> transformers.LogitsProcessorList:
    """Steps for `generate(logits_processor=)`, in an order that means something.

    beams, sample: `generate`'s num_beams and do_sample.
    ValueError: where one stands before another that it must follow; two of style, temperature, entropy or refinement; a
    temperature where nothing is drawn, since beams and the likeliest token look for what is likeliest at any.
    """
    last = None
    for step in steps:
        here = place(step)
        if here is None:
            continue
        if not sample and here in ("temperature", "entropy") and not getattr(step, "idle", False):
            what = "beams" if beams > 1 else "the likeliest token"
            fail("ordered", "steps", f"hold no temperature with {what}", _said(step), "Draw, or drop it")
        if last is not None:
            before = PLACES.index(place(last) or here)
            if before > PLACES.index(here):
                fail(
                    "ordered",
                    "steps",
                    f"be in the order {', '.join(PLACES)}",
                    f"{_said(last)} before {_said(step)}",
                    "Swap",
                )
            if place(last) == here and here != "truncation":
                fail("ordered", "steps", f"hold one step of {here}", f"{_said(last)} and {_said(step)}", "Drop one")
        last = step
    return transformers.LogitsProcessorList(steps)


def _said(step: Any) -> str:
    return repr(step) if isinstance(step, Step) else type(step).__name__


class Watch:
    """What steps did to the distributions of a batch, draw after draw: `around(steps)` in place of steps.

    entropy: [B] of each draw, in nats, of the distribution that was drawn from; kl: [B], in nats, KL(it‖the model's).
    Both are left on the device. Cost: two log-softmaxes and a copy of scores a draw.
    """

    def __init__(self) -> None:
        self.entropy: list[Tensor] = []
        self.kl: list[Tensor] = []
        self._before: Tensor | None = None

    def around(self, steps: Sequence[transformers.LogitsProcessor]) -> list[transformers.LogitsProcessor]:
        """The steps, watched."""
        return [_Hook(self._begin), *steps, _Hook(self._end)]

    def _begin(self, scores: Tensor) -> None:
        self._before = scores.clone()

    def _end(self, scores: Tensor) -> None:
        assert self._before is not None
        after, before = scores.log_softmax(-1), self._before.log_softmax(-1)
        drawn = after.exp()
        self.entropy.append(-torch.linalg.vecdot(drawn, after.nan_to_num(neginf=0.0)))
        shift = (after - before).nan_to_num(nan=0.0, neginf=0.0)  # nan: left out by both
        self.kl.append(torch.linalg.vecdot(drawn, shift).clamp_min(0))
        self._before = None


class _Hook(transformers.LogitsProcessor):
    def __init__(self, told: Any) -> None:
        self.told = told

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.told(scores)
        return scores


class Likeliest(transformers.LogitsProcessor):
    """The last of the steps of a greedy text: all on the likeliest token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(-1, scores.argmax(-1, keepdim=True), 0.0)


def warpers(temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0) -> list[transformers.LogitsProcessor]:
    """transformers' own steps of these settings, in its order: none where they leave the model as it is."""
    found: list[transformers.LogitsProcessor] = []
    if temperature != 1.0:
        found.append(logits_process.TemperatureLogitsWarper(temperature))
    if top_p < 1.0:
        found.append(logits_process.TopPLogitsWarper(top_p))
    if min_p > 0.0:
        found.append(logits_process.MinPLogitsWarper(min_p))
    return found
