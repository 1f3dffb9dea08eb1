"""Distribution terms and their weighted sums: scalars J of means over the rows of a batch.

A term declares which statistics of every row's q = softmax(z) it needs, how rows are summed into **moments** (sums
over rows, and the summed weights), and J as a function of their quotients. Moments add over gradient accumulation,
processes and steps; J is ordinary PyTorch on small float64 vectors, differentiated by autograd.

No term asks for a grouping of rows: a row's s_n = q_n @ phi [K] is summed here by its age, context or class, and the
gradient goes back as a weight of every row's features, which the fused loss takes per row. Groups of rows would need
[groups, V] memory each, and the product of all groupings where terms meet; features serve any number of terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import fail


@dataclass(frozen=True)
class Statistics:
    """Statistics of the rows of a batch; row (b, t) is the model's distribution of the token after input_ids[b, t]."""

    input_ids: Tensor  # [B, T] int64, the model's input
    weight: Tensor  # [B, T], 0 for rows in no term
    columns: Tensor | None = None  # [V], sum_n weight_n q_n
    features: Tensor | None = None  # [B, T, K], q @ features, in the dtype of the pass: it is the large one
    entropy: Tensor | None = None  # [B, T]
    log_prob: Tensor | None = None  # [B, T], of the label
    divergence: Tensor | None = None  # [B, T], KL(q_n || reference), of rows of the model's own text
    texts: Tensor | None = None  # [B, R], phi of whole texts that the model wrote, and
    text_weight: Tensor | None = None  # [B], what each of them counts


class Moments(NamedTuple):
    """Sums over rows, float64: they add over micro-batches, processes and steps."""

    total: Tensor  # 0-d, sum of row weights
    columns: Tensor  # [V] or [0], sum_n weight_n q_n
    sums: Tensor  # [S], of all terms one after the other
    weights: Tensor  # [S], of the rows that each was summed over

    def flat(self) -> Tensor:
        """All of them, [1 + V + 2 S]."""
        return torch.cat([self.total.reshape(1), self.columns, self.sums, self.weights])


class DistributionTerm:
    """A scalar J of the means of a batch. Terms add up and are weighed: `0.1 * a + 0.02 * b` is a `TermSum`.

    A subclass sets what it needs and writes `moments` (unless it is of the mean distribution alone) and `value`.
    linear: whether its sums are linear in q, so that the delayed mode may weigh rows that it has not seen.
    """

    columns = False  # f = sum_n w_n q_n / sum_n w_n [V]
    text = False  # input_ids
    entropy = False
    log_prob = False
    divergence = False
    reads: Callable[[Sequence[str]], Tensor] | None = None  # whole texts of the model's own as phi [B, S]
    linear = True
    size = 0  # S, the number of its sums
    vocab: int | None = None  # V, where a tensor of its own tells
    features: Tensor | None = None  # [V, K] sparse COO

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Sums [S] and their weights [S]; statistics.features has this term's K alone, statistics.texts its S."""
        raise NotImplementedError

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """J, 0-d. mean: f [V] of a term of the mean distribution, else sums / weights [S] (0 where nothing was summed);
        share [S]: weights over all rows' weight."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The term's name in a sum of terms."""
        return type(self).__name__

    def on(self, device: torch.device) -> None:
        """Move the term's tensors there, once."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))

    def __add__(self, other: Any) -> TermSum:
        return TermSum(_parts(self) + _parts(other))

    def __radd__(self, other: Any) -> TermSum:
        return TermSum(_parts(other) + _parts(self))

    def __mul__(self, weight: Any) -> TermSum:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight != weight:
            fail("DistributionTerm", "a weight", "be a number", repr(weight), "Write 0.1 * term", TypeError)
        return TermSum([(float(weight) * by, term) for by, term in _parts(self)])

    __rmul__ = __mul__


class TermSum(DistributionTerm):
    """sum_i weight_i J_i, evaluated on one set of moments."""

    def __init__(self, parts: list[tuple[float, DistributionTerm]]) -> None:
        if not parts:
            fail("TermSum", "terms", "be one or more", "none", "Pass a term, or leave the terms out")
        self.parts = parts
        terms = [term for _, term in parts]
        self.columns = any(term.columns for term in terms)
        self.text = any(term.text for term in terms)
        self.entropy = any(term.entropy for term in terms)
        self.log_prob = any(term.log_prob for term in terms)
        self.divergence = any(term.divergence for term in terms)
        self.reads = self._read if any(term.reads is not None for term in terms) else None
        self.linear = all(term.linear for term in terms)
        self.size = sum(term.size for term in terms)
        known = {term.vocab for term in terms if term.vocab is not None}
        if len(known) > 1:
            fail("TermSum", "terms", "be of one vocabulary", sorted(known), "Build them all for the model's V")
        self.vocab = next(iter(known), None)
        matrices = [term.features for term in terms if term.features is not None]
        self.features = torch.cat([each.to(torch.float32) for each in matrices], 1).coalesce() if matrices else None

    @property
    def names(self) -> list[str]:
        """Of the parts, each once."""
        plain = [term.name for _, term in self.parts]
        return [name if plain.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(plain)]

    def on(self, device: torch.device) -> None:
        """Move all terms there."""
        super().on(device)
        for _, term in self.parts:
            term.on(device)

    def gathered(self, statistics: Statistics) -> Moments:
        """The moments of a batch; differentiable in its statistics."""
        weight = statistics.weight.double()
        columns = statistics.columns if self.columns else None
        sums, weights, first, read = [], [], 0, 0
        for _, term in self.parts:
            last = first + (0 if term.features is None else term.features.shape[1])
            texts = None
            if term.reads is not None and statistics.texts is not None:
                texts, read = statistics.texts[:, read : read + term.size], read + term.size
            if term.size:
                own = None if statistics.features is None else statistics.features[..., first:last]
                found = term.moments(replace(statistics, weight=weight, features=own, texts=texts))
                sums.append(found[0].double())
                weights.append(found[1].double().expand(term.size))
            first = last
        none = weight.new_zeros(0)
        return Moments(
            weight.sum(),
            none if columns is None else columns.double(),
            torch.cat(sums) if sums else none,
            torch.cat(weights) if weights else none,
        )

    def _read(self, texts: Sequence[str]) -> Tensor:
        """phi of all terms of whole texts, side by side."""
        return torch.cat([term.reads(texts) for _, term in self.parts if term.reads is not None], 1)

    def values(self, moments: Moments) -> list[Tensor]:
        """weight_i J_i of every part, 0-d float64; differentiable in the moments."""
        means = self.means(moments)
        return [by * term.value(*of) for (by, term), of in zip(self.parts, means, strict=True)]

    def means(self, moments: Moments) -> list[tuple[Tensor, Tensor]]:
        """mean and share of every part's `value`."""
        total = _or_one(moments.total)
        f, share = moments.columns / total, moments.weights / total
        means, out, first = moments.sums / _or_one(moments.weights), [], 0
        for _, term in self.parts:
            last = first + term.size
            out.append((f if term.columns else means[first:last], share[first:last]))
            first = last
        return out

    def split(self, flat: Tensor) -> Moments:
        """The inverse of `Moments.flat`."""
        vocab = flat.numel() - 1 - 2 * self.size
        total, columns, sums, weights = flat.split([1, vocab, self.size, self.size])
        return Moments(total[0], columns, sums, weights)


def _or_one(of: Tensor) -> Tensor:
    return torch.where(of == 0, 1.0, of)


def _parts(term: Any) -> list[tuple[float, DistributionTerm]]:
    if isinstance(term, TermSum):
        return term.parts
    if isinstance(term, DistributionTerm):
        return [(1.0, term)]
    if not (isinstance(term, int) and term == 0):  # where sum() starts
        got = type(term).__name__
        fail("DistributionTerm", "what is added to it", "be a term", got, "Add terms to terms", TypeError)
    return []


def as_sum(function: str, term: Any) -> TermSum:
    """A term or a sum of terms as a sum."""
    if not isinstance(term, DistributionTerm):
        remedy = "Pass for example 0.1 * TokenL2(target)"
        fail(function, "term", "be a DistributionTerm or a sum of them", type(term).__name__, remedy, TypeError)
    return term if isinstance(term, TermSum) else TermSum(_parts(term))


def tensor(function: str, name: str, value: Any, shape: str, ndim: tuple[int, ...]) -> Tensor:
    """A constant of a term, detached: finite, of as many dimensions."""
    if not isinstance(value, Tensor):
        fail(function, name, "be a tensor", type(value).__name__, f"Pass a tensor {shape}", TypeError)
    if value.ndim not in ndim or value.numel() == 0:
        fail(function, name, f"have shape {shape}", list(value.shape), "Reshape it")
    if not bool(torch.isfinite(value).all()):
        fail(function, name, "be finite", "NaN or infinite entries", "Look for 0 / 0 in how it was made")
    return value.detach()


def probabilities(function: str, name: str, value: Any, positive: bool = False) -> Tensor:
    """A distribution over the vocabulary [V], float64, its sum made 1 exactly."""
    p = tensor(function, name, value, "[V]", (1,)).double()
    total, least = float(p.sum()), float(p.min())
    if least < 0 or abs(total - 1.0) > 1e-3:
        got = f"a sum of {total:.6g} and a least entry of {least:.3g}"
        fail(function, name, "be probabilities that sum to 1", got, "Divide counts by their sum")
    if positive and least == 0:
        remedy = "Smooth it, for example (counts + 0.5) / (counts + 0.5).sum()"
        fail(function, name, "be above 0 everywhere", f"{int((p == 0).sum())} zeros", remedy)
    return p / total


def membership(function: str, name: str, value: Any) -> Tensor:
    """Which tokens are in which class [V, K], sparse COO float32, of [V] or [V, K] bool or numbers."""
    dense = tensor(function, name, value, "[V] or [V, K]", (1, 2)).to(torch.float32)
    dense = dense[:, None] if dense.ndim == 1 else dense
    if bool((dense < 0).any()) or not bool((dense != 0).any(0).all()):
        fail(
            function, name, "hold a token in every class, none negative", "an empty class", "Check the tokenizer's ids"
        )
    return dense.to_sparse_coo().coalesce()
