"""Optimal transport between the model's mean distribution and a target, over token embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from .base import tensor
from .columns import _OfMean

_CLOSE = 1e-6  # of a plan's marginals
_LEAST = 0.01  # below, exp(-cost / regularisation) leaves float64 for costs up to 2


class EmbeddingTransport(_OfMean):
    """J = S(f, t), transport over the vocabulary where moving mass from token i to j costs 1 - cos(E_i, E_j).

        S(f, t) = OT(f, t) - OT(f, f) / 2 - OT(t, t) / 2    entropic, debiased (Feydy et al., arXiv:1810.08278)
        S(f, t) = min_P <P, C>                              exact (regularisation=None)

    G is the dual potential: of f, less that of OT(f, f) / 2. Solved on the k likeliest tokens of f, those of t,
    and one bucket for all others, whose place is their mean embedding under t; its potential is that of every token in
    it. target: [V]; embeddings: [V, d]; regularisation: epsilon, in units of cost, at least 0.01.

    Cost: up to (2 k + 1)² numbers and their transport on the CPU in float64, which waits for f once a step, by POT
    (Flamary et al., JMLR 22, 2021): pip install 'dft-kernels[terms]'. Warning: what has a like embedding counts as
    alike, and inside the bucket nothing is told apart. The exact potential jumps where the plan changes. EMO
    (arXiv:2310.04691) bounds such a transport row by row; this one is of the mean.
    """

    def __init__(self, target: Tensor, embeddings: Tensor, k: int = 256, regularisation: float | None = 0.05) -> None:
        name = "EmbeddingTransport"
        super().__init__(target)
        self.embeddings = tensor(name, "embeddings", embeddings, "[V, d]", (2,))
        if not self.embeddings.is_floating_point() or len(self.embeddings) != self.vocab:
            got = f"{list(self.embeddings.shape)} {self.embeddings.dtype}"
            fail(name, "embeddings", f"be floating [{self.vocab}, d]", got, "One row for each vocabulary id")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            fail(name, "k", "be an int of at least 1", repr(k), "The usual one is 256")
        known: Any = regularisation
        if known is not None and not (isinstance(known, (int, float)) and known >= _LEAST):
            remedy = "Pass None for the exact transport"
            fail(name, "regularisation", f"be at least {_LEAST} or None", repr(regularisation), remedy)
        try:
            import ot  # noqa: F401 - said here, not in the middle of a step
        except ImportError:
            raise ImportError(
                "EmbeddingTransport: POT must be installed, got no module ot. pip install 'dft-kernels[terms]'."
            ) from None
        self.k, self.regularisation = min(k, self.target.numel()), regularisation

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of f [V]."""
        known = mean.detach()
        inside = torch.zeros_like(known, dtype=torch.bool)
        for of in (known, self.target):
            inside[of.topk(self.k).indices] = True
        at = inside.nonzero()[:, 0]

        def joined(of: Tensor) -> Tensor:  # its support and its bucket, [S + 1]; the tail summed, never 1 - sum
            return torch.cat([of[at], of.masked_fill(inside, 0.0).sum()[None]])

        source, sink = joined(mean), joined(self.target)
        cost = self._cost(at, inside)
        return _Transport.apply(source / source.sum(), sink / sink.sum(), cost, self.regularisation)

    def _cost(self, at: Tensor, inside: Tensor) -> Tensor:
        """[S + 1, S + 1] on the CPU."""
        tail = self.target.masked_fill(inside, 0.0)
        tail = torch.where(tail.sum() > 0, tail, (~inside).double())
        place = tail.to(self.embeddings.dtype) @ self.embeddings
        points = torch.cat([self.embeddings[at], place[None]]).double().cpu()
        points = torch.nn.functional.normalize(points, dim=1)
        cost = (1 - points @ points.t()).clamp_(min=0.0)
        return cost.fill_diagonal_(0.0)


class _Transport(torch.autograd.Function):
    """The value, and its gradient wrt the first distribution: the dual potential."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, sink: Tensor, cost: Tensor, epsilon: float | None) -> Tensor:
        import ot

        a, b, c = source.detach().cpu().numpy(), sink.cpu().numpy(), cost.numpy()
        if epsilon is None:
            value, log = ot.emd2(a, b, c, log=True)
            potential = log["u"]
        else:
            own, target = _own_potential(a, c, epsilon), _own_potential(b, c, epsilon)
            potential, other = _potentials(a, b, c, epsilon, own, target)
            value = a @ potential + b @ other - a @ own - b @ target
            potential = potential - own
        ctx.save_for_backward(torch.as_tensor(potential, dtype=source.dtype).to(source.device))
        return torch.as_tensor(float(value), dtype=source.dtype).to(source.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (potential,) = ctx.saved_tensors
        return grad * potential, None, None, None


def _potentials(a: Any, b: Any, cost: Any, epsilon: float, f: Any, g: Any) -> tuple[Any, Any]:
    """f and g of OT = <f, a> + <g, b>, the plan being a_i b_j exp((f_i + g_j - C_ij) / epsilon): finite where a or b
    is 0 too. From those that are right where a = b, near which iterations from nowhere creep."""
    import numpy
    import ot

    with numpy.errstate(divide="ignore"):
        start = numpy.log(a) + f / epsilon, numpy.log(b) + g / epsilon
    _, log = ot.sinkhorn(a, b, cost, epsilon, numItermax=20000, stopThr=_CLOSE, log=True, warmstart=start)
    kernel = numpy.exp(-cost / epsilon)
    v = log["v"]
    f = -epsilon * numpy.log(kernel @ v)
    g = -epsilon * numpy.log(kernel.T @ (a * numpy.exp(f / epsilon)))
    return f, g


def _own_potential(a: Any, cost: Any, epsilon: float) -> Any:
    """f of OT(a, a) = 2 <f, a>, whose two potentials are one: means of steps, which converge where steps in turn creep
    (Feydy et al., section 3.1)."""
    import numpy

    kernel, f = numpy.exp(-cost / epsilon), numpy.zeros_like(a)
    for _ in range(1000):
        step = -epsilon * numpy.log(kernel @ (a * numpy.exp(f / epsilon)))
        moved, f = a @ numpy.abs(step - f), (step + f) / 2
        if moved < _CLOSE * epsilon:
            break
    return -epsilon * numpy.log(kernel @ (a * numpy.exp(f / epsilon)))
