"""Terms of whole texts that the model writes, by what a reader of texts says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from .base import DistributionTerm, Statistics


class TextMMD(DistributionTerm):
    """J = ‖E phi(x) - t‖², t the mean of phi over people's texts: the squared maximum mean discrepancy between them and
    the texts x that the model writes, by the kernel <phi(x), phi(y)> (Gretton et al., "A Kernel Two-Sample Test", JMLR
    13, 2012). No row's q tells what a text is like, so that the whole gradient is `OnPolicy`'s score term,

        grad J = E[2 <E phi - t, phi(x)> grad log q(x)],

    with E phi the running mean of earlier rollouts: texts like people's and unlike what the model has written are
    rewarded. J of a running mean is larger than it is by about (1 - ‖t‖²) / (texts that it looks back on), for phi of
    norm 1.

    reads: from texts (a list of str) to phi [B, R], finite and floating, a row for each text that depends on no other:
    embeddings and `random_fourier_features` of them, counts of words, a judge's marks. human: what people wrote, as
    long as what the model is to write, after the same prompts where it has any. Memory: R numbers, and phi.
    """

    def __init__(self, reads: Callable[[Sequence[str]], Tensor], human: Sequence[str]) -> None:
        given: Any = human
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) == 0:
            got = "one text" if isinstance(given, str) else f"{type(given).__name__} of none"
            fail("TextMMD", "human", "be texts, one at least", got, "Pass a list of what people wrote")
        self._phi = reads
        self.size = 0  # not known before phi of people's
        t = self.reads(human).mean(0)
        self.size, self.target = len(t), t

    def reads(self, texts: Sequence[str]) -> Tensor:  # type: ignore[override]
        """phi of texts, [B, R] float64. ValueError or TypeError where it is not that."""
        phi: Any = self._phi(list(texts))
        wanted = f"[{len(texts)}, {self.size or 'R'}]"
        if not isinstance(phi, Tensor) or not phi.is_floating_point():
            got = str(phi.dtype) if isinstance(phi, Tensor) else type(phi).__name__
            fail("TextMMD", "phi", f"be a floating tensor {wanted}", got, "Return one row for each text", TypeError)
        if phi.ndim != 2 or len(phi) != len(texts) or phi.shape[1] != (self.size or phi.shape[1]) or not phi.numel():
            fail("TextMMD", "phi", f"have shape {wanted}", list(phi.shape), "Return one row for each text")
        if not bool(torch.isfinite(phi).all()):
            fail("TextMMD", "phi", "be finite", "NaN or infinite entries", "Look at the empty texts")
        return phi.detach().double()

    def gain(self, texts: Sequence[str], tokens: float) -> float:
        """How hard it pulls at a weight of 1, in units of how hard cross-entropy holds: what `gains` is to the terms of
        rows. By a tilt of whole texts, q(x) exp(-s r(x)) with r = 2 <E phi - t, phi(x)>, J falls by s V and
        cross-entropy rises by s² V / 2 a text, V = Var r, so that

            g = tokens V / (2 J)

        texts: what the model writes, 6 or more, of `tokens` tokens on average. A third of them has the variance, the
        other two E phi, in turns, so that neither V nor J has their noise in it; 0 where none of one is left."""
        phi = self.reads(texts)
        if len(phi) < 6:
            fail("TextMMD.gain", "texts", "be 6 or more", len(phi), "Draw more of them")
        thirds, t = [phi[at::3] for at in range(3)], self.target.to(phi)
        apart = [third.mean(0) - t for third in thirds]
        j = v = 0.0
        for third, a, b in zip(thirds, apart[1:] + apart[:1], apart[2:] + apart[:2], strict=True):
            j += float(a @ b) / 3
            v += 4 * float(torch.cov(torch.stack([third @ a, third @ b]))[0, 1]) / 3
        return max(0.0, tokens * v / (2 * j)) if j > 0 else 0.0

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """sum_b w_b phi_b [R], sum_b w_b."""
        assert statistics.texts is not None
        assert statistics.text_weight is not None
        return statistics.text_weight @ statistics.texts, statistics.text_weight.sum()

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of the mean of phi [R]."""
        return (mean - self.target).square().sum()
