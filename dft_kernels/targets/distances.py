"""Distances between distributions of human writing, on small tensors, in float64.

p, q: probabilities of the same shape; over ordered values (lengths, gaps), the last dimension is the order, a step
apart. Each returns a float and raises ValueError where shapes differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _pair(name: str, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    if p.shape != q.shape:
        raise ValueError(
            f"{name}: q must have the shape of p, {list(p.shape)}, got {list(q.shape)}. "
            "Compare statistics of one tokenizer and one number of bins."
        )
    return p.double(), q.double()


def l2(p: Tensor, q: Tensor) -> float:
    """sqrt(sum (p - q)²)"""
    p, q = _pair("l2", p, q)
    return float((p - q).square().sum().sqrt())


def total_variation(p: Tensor, q: Tensor) -> float:
    """½ sum abs(p - q): the largest difference in probability that any event can have."""
    p, q = _pair("total_variation", p, q)
    return float((p - q).abs().sum() / 2)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) = sum p (log p - log q) in nats, inf where p > 0 = q (Kullback and Leibler, 1951)."""
    p, q = _pair("kl", p, q)
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum())


def wasserstein_1(p: Tensor, q: Tensor) -> float:
    """sum abs(F_p - F_q) over ordered values, F the cumulative sums: in steps (Vallender, 1974)."""
    p, q = _pair("wasserstein_1", p, q)
    return float((p.cumsum(-1) - q.cumsum(-1)).abs().sum())


def cramer(p: Tensor, q: Tensor) -> float:
    """sum (F_p - F_q)² over ordered values (Bellemare et al., arXiv:1705.10743)."""
    p, q = _pair("cramer", p, q)
    return float((p.cumsum(-1) - q.cumsum(-1)).square().sum())


def hazard(p: Tensor, q: Tensor) -> float:
    """sum_a s(a) abs(p(a) - q(a)) / sum s of two hazards [A], s the mean of their survivals
    prod_{b<a} (1 - h(b)): the difference that a token chosen at random would see."""
    p, q = _pair("hazard", p, q)
    first = torch.ones(1, dtype=torch.float64)
    weight = torch.cat([first, (1 - p[:-1]).cumprod(0)]) + torch.cat([first, (1 - q[:-1]).cumprod(0)])
    return float((weight * (p - q).abs()).sum() / weight.sum())


def sampling_floor(p: Tensor, n_1: float, n_2: float) -> float:
    """sqrt((1 - ‖p‖²)(1/n_1 + 1/n_2)): root of the expected squared L2 between the frequencies of two independent
    samples of n_1 and n_2 draws from p. Words of a text cluster, so that its own halves lie further apart."""
    return math.sqrt((1 - float(p.double().square().sum())) * (1 / n_1 + 1 / n_2))
