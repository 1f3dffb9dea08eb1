"""Tokens left out by their scores; min-p, top-p and top-k are transformers' own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import fail
from .native import computed
from .steps import Step

_FLOOR = -1e15  # of a score below the row's largest: its square and their sum are finite in fp32, its probability is 0


class TopNSigma(Step):
    """Leaves out tokens whose score lies more than n standard deviations below the row's largest: score < max - n
    sigma, sigma over the tokens that are left (Tang et al., arXiv:2411.07641). The same tokens stay at any
    temperature.

    n: above 0; None, the default, leaves none out. The paper's is 1. Cost: by the C++ kernel a log-softmax and a pass
    over [B, V], else twelve.
    """

    place = "truncation"

    def __init__(self, n: float | None = None) -> None:
        if n is not None and not 0 < n < math.inf:
            fail("TopNSigma", "n", "be above 0", n, "The paper's is 1; None leaves out none")
        self.n = n

    @property
    def idle(self) -> bool:
        """Where none is left out."""
        return self.n is None

    def step(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See Step."""
        assert self.n is not None
        made = computed("scores_within", scores, self.n)
        if made is not None:
            return made
        below = scores - scores.amax(-1, keepdim=True)
        left = below > -math.inf
        count = left.sum(-1, keepdim=True)
        known = below.clamp(min=_FLOOR).mul_(left)
        apart = known.sub_(known.sum(-1, keepdim=True) / count).mul_(left)
        sigma = (torch.linalg.vecdot(apart, apart)[:, None] / count).sqrt()
        return scores.masked_fill(below < -self.n * sigma, -math.inf).log_softmax(-1)

    def __repr__(self) -> str:
        return "TopNSigma(none left out)" if self.n is None else f"TopNSigma(score >= max - {self.n:g} sigma)"
