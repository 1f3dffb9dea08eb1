"""Styles as shifts of the scores."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import fail
from ..targets.target import Target
from .native import computed
from .steps import Step

SMOOTHING = 5.0  # occurrences


class StyleShift(Step):
    """Scores + gamma log((n t + 5) / (n b + 5)), t and b the shares of each token in target and base, n the tokens of
    the smaller corpus: what neither has is left as it is, and what was seen a few times is hardly moved.

    With gamma 1 a text that has the base's shares is drawn towards the target's; below 0 it is drawn away, above 1
    beyond. 0, the default, leaves the model as it is.
    target, base: of the model's tokenizer; base: how the model writes as it is (`dft-kernels gap --own`), or how
    everyone does (the preset `reference`).
    untouched: token ids that are not moved, before the others are made to sum to 1; special tokens stand in no target
    and are none the less named here, where a text may hold their characters.
    Cost: a log-softmax of [B, V], a sum where the C++ kernel does not run; V numbers.
    """

    place = "style"

    def __init__(self, target: Target, base: Target, gamma: float = 0.0, untouched: Iterable[int] = ()) -> None:
        if not math.isfinite(gamma):
            fail("StyleShift", "gamma", "be finite", gamma, "0 leaves the model as it is, 1 is the target's way")
        tokenizers = {one.about.tokenizer_sha256 for one in (target, base)}
        if len(tokenizers) > 1 or None in tokenizers:
            names = f"{target.about.tokenizer} and {base.about.tokenizer}"
            fail("StyleShift", "target and base", "be of one tokenizer", names, "Build both for the model's")
        self.target, self.base, self.gamma = target, base, float(gamma)
        self._shift = self.gamma * log_ratio(target, base)
        self._shift[torch.tensor(list(untouched), dtype=torch.int64)] = 0.0
        self._size = len(self._shift)

    @property
    def idle(self) -> bool:
        """Where nothing is moved."""
        return self.gamma == 0

    def step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See Step."""
        size, vocab = self._size, scores.shape[1]
        if vocab < size:
            fail("StyleShift", "target", f"be of the model's {vocab} tokens", size, "Build it for the model")
        if len(self._shift) != vocab:
            self._shift = torch.nn.functional.pad(self._shift[:size], (0, vocab - size))
        self._shift = self._shift.to(scores)
        made = computed("shifted_scores", scores, self._shift)
        return (scores + self._shift).log_softmax(-1) if made is None else made

    def __repr__(self) -> str:
        return f"StyleShift({self.gamma:g} log({self.target.about.name} / {self.base.about.name}))"


def log_ratio(target: Target, base: Target, smoothing: float = SMOOTHING) -> Tensor:
    """log(t / b) of every token [V], smoothed as `StyleShift` says."""
    n = min(target.about.tokens or 0, base.about.tokens or 0)
    t, b = (one["unigram"].double() * n + smoothing for one in (target, base))
    return (t.log() - b.log()).float()
