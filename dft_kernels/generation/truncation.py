"""Tokens left out by their scores; min-p, top-p and top-k are transformers' own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import fail
from .steps import Step


class TopNSigma(Step):
    """Leaves out tokens whose score lies more than n standard deviations below the row's largest: score < max - n
    sigma, sigma over the tokens that are left (Tang et al., arXiv:2411.07641). The same tokens stay at any
    temperature.

    n: above 0; None, the default, leaves none out. The paper's is 1. Cost: three passes over [B, V].
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
        there = scores > -math.inf
        count = there.sum(-1, keepdim=True)
        known = scores.masked_fill(~there, 0.0)
        centred = torch.where(there, scores - known.sum(-1, keepdim=True) / count, 0.0)
        sigma = (centred.square().sum(-1, keepdim=True) / count).sqrt()
        out = scores.masked_fill(scores < scores.amax(-1, keepdim=True) - self.n * sigma, -math.inf)
        return out - out.logsumexp(-1, keepdim=True)

    def __repr__(self) -> str:
        return "TopNSigma(none left out)" if self.n is None else f"TopNSigma(score >= max - {self.n:g} sigma)"
