"""Terms of the mean distribution f = sum_n w_n q_n / sum_n w_n [V], against a target t [V].

dz_n = (w_n / sum w) q_n (G - <q_n, G>) with G = dJ/df [V], which the fused loss takes as a potential. Cost: the column
sums of the pass, [V] memory, no product. What holds for all of them: on human prefixes cross-entropy's own optimum has
these means right already, so the gap that they close is on text of the model's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from .base import DistributionTerm, probabilities, tensor


class _OfMean(DistributionTerm):
    columns = True
    positive = False

    def __init__(self, target: Tensor) -> None:
        self.target = probabilities(type(self).__name__, "target", target, self.positive)
        self.vocab = self.target.numel()


class TokenL2(_OfMean):
    """J = ‖f - t‖, or ‖f - t‖² (squared); G = (f - t) / ‖f - t‖, or 2 (f - t).

    target: [V] probabilities. The ten most frequent tokens carry most of it: what is rare goes unheard (`ChiSquared`).
    """

    def __init__(self, target: Tensor, squared: bool = False) -> None:
        super().__init__(target)
        self.squared = squared

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of f [V]."""
        gap = mean - self.target
        return gap.square().sum() if self.squared else torch.linalg.vector_norm(gap)


class ChiSquared(_OfMean):
    """J = sum_v (f_v - t_v)² / t_v; G = 2 (f - t) / t (Pearson's chi-squared over the number of draws).

    target: [V] probabilities, all above 0. Every token counts by its relative error, so the rarest, whose target is
    mostly smoothing and whose batch mean is mostly noise, carry most of it.
    """

    positive = True

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of f [V]."""
        return ((mean - self.target).square() / self.target).sum()


class UnigramKL(_OfMean):
    """J = KL(t‖f) ("forward", covers the target's modes), G = -t / f, or KL(f‖t) ("reverse"), G = log(f / t) + 1.

    target: [V] probabilities; above 0 everywhere for "reverse". A batch's f_hat makes KL larger than it is by about
    (tokens in play) / (2 rows): use the delayed mode or cross-fitting.
    """

    def __init__(self, target: Tensor, direction: str = "forward") -> None:
        if direction not in ("forward", "reverse"):
            fail("UnigramKL", "direction", "be forward or reverse", repr(direction), "forward is KL(target‖model)")
        self.positive = direction == "reverse"
        super().__init__(target)
        self.direction = direction
        self.known = torch.special.xlogy(self.target, self.target) - self.target  # what no step changes

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of f [V]; its addends are never negative."""
        if self.direction == "forward":
            return (self.known - torch.special.xlogy(self.target, mean) + mean).sum()
        return (torch.special.xlogy(mean, mean) - torch.special.xlogy(mean, self.target) - mean + self.target).sum()


class VocabularyMMD(_OfMean):
    """J = ‖Phi^T (f - t)‖², the squared maximum mean discrepancy of the kernel Phi Phi^T over the vocabulary;
    G = 2 Phi (Phi^T (f - t)). Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012.

    target: [V]; features: [V, r], token embeddings or `random_fourier_features` of them, kept in their dtype. With the
    identity it is squared `TokenL2`. FLOPs: 4 V r a step. Embeddings as Phi compare no more than mean embeddings.
    """

    def __init__(self, target: Tensor, features: Tensor) -> None:
        super().__init__(target)
        self.phi = tensor("VocabularyMMD", "features", features, "[V, r]", (2,))
        if not self.phi.is_floating_point() or len(self.phi) != self.vocab:
            got = f"{list(self.phi.shape)} {self.phi.dtype}"
            fail("VocabularyMMD", "features", f"be floating [{self.vocab}, r]", got, "One row for each vocabulary id")

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of f [V]."""
        return (self.phi.t() @ (mean - self.target).to(self.phi.dtype)).double().square().sum()


def random_fourier_features(embeddings: Tensor, r: int = 256, bandwidth: float | None = None, seed: int = 0) -> Tensor:
    """phi(x) = sqrt(2 / r) cos(W x + b) [V, r], W of N(0, 1 / bandwidth²), b uniform: <phi(x), phi(y)> is about
    exp(-‖x - y‖² / (2 bandwidth²)), off by about 1 / sqrt(r). Rahimi and Recht, NIPS 2007.

    embeddings: [V, d] floating; bandwidth: None: the median distance of 4096 pairs of tokens. The draws are the seed's
    on any device. Memory: V r in float32 (float64 for float64). FLOPs: 2 V d r, once.
    """
    x = tensor("random_fourier_features", "embeddings", embeddings, "[V, d]", (2,))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        fail("random_fourier_features", "r", "be an int of at least 1", repr(r), "The usual one is 256")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, draw = x.to(wide), torch.Generator().manual_seed(seed)
    if bandwidth is None:
        pairs = torch.randint(0, len(x), (2, 4096), generator=draw).to(x.device)
        distances = (x[pairs[0]] - x[pairs[1]]).norm(dim=1)
        bandwidth = float(distances[distances > 0].median()) if bool((distances > 0).any()) else 1.0
    known: Any = bandwidth
    if not (isinstance(known, (int, float)) and 0 < known < math.inf):
        fail("random_fourier_features", "bandwidth", "be greater than 0 or None", repr(bandwidth), "Pass a distance")
    w = torch.randn(x.shape[1], r, generator=draw, dtype=torch.float64) / bandwidth
    b = torch.rand(r, generator=draw, dtype=torch.float64) * (2 * math.pi)
    return (x @ w.to(x) + b.to(x)).cos_().mul_(math.sqrt(2.0 / r))
