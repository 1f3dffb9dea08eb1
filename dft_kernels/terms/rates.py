"""Terms of row features and of the rows' entropy: punctuation rates, tracked n-grams, entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import sparse_matrix
from ..errors import fail
from .base import DistributionTerm, Statistics, membership, tensor

_BITS = 21  # of a token id in the key of a context of up to three
_LONGEST = 63 // _BITS


class PunctuationRate(DistributionTerm):
    """J = sum_k (r_k - rho_k)² / rho_k, r_k the mean mass on class k: r_k = sum_n w_n <q_n, phi_k> / sum_n w_n.

    G = sum_k 2 (r_k - rho_k) / rho_k phi_k. classes: [V] or [V, K] membership (commas, dashes, quotes, ...), rate: [K],
    all above 0, the corpus' share of tokens. Cost: K features a row. It knows how often a mark comes, not where: see
    `PunctuationGap`. A band, not a maximum: a corpus without dashes is as unnatural as one with too many.
    """

    def __init__(self, classes: Tensor, rate: Tensor) -> None:
        self.features = membership("PunctuationRate", "classes", classes)
        self.vocab, self.size = self.features.shape
        self.rate = tensor("PunctuationRate", "rate", rate, "[K]", (1,)).double()
        if self.rate.numel() != self.size or float(self.rate.min()) <= 0 or float(self.rate.max()) > 1:
            got = f"{list(self.rate.shape)} in {float(self.rate.min()):.3g}..{float(self.rate.max()):.3g}"
            remedy = "Leave a class out that the corpus does not have"
            fail("PunctuationRate", "rate", f"be {self.size} numbers above 0 and at most 1", got, remedy)

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """sum_n w_n s_n [K]."""
        assert statistics.features is not None
        return torch.einsum("bt,btk->k", statistics.weight, statistics.features.double()), statistics.weight.sum()

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of r [K]."""
        return ((mean - self.rate).square() / self.rate).sum()


class NGrams(DistributionTerm):
    """J = sum_m share_m (c_m - p_m)² / p_m over tracked n-grams: c_m the mean probability of completion m in the
    rows whose text ends in context m, share_m those rows' share of all, p_m the corpus' probability.

    contexts: [M, n] int64, n of 1 to 3 tokens (one length a term), or [M]; completions: [M]; probabilities: [M], in
    (0, 1]. vocab_size: V. The realised text selects the rows, so q is never multiplied over positions, and a context
    that does not come adds 0. Cost: a feature for each distinct completion, [rows, K] memory: the union of completions,
    not a [V] column for each context. A batch has few rows of any one context: use the delayed mode or cross-fitting.
    """

    text = True

    def __init__(self, contexts: Tensor, completions: Tensor, probabilities: Tensor, vocab_size: int) -> None:
        name = "NGrams"
        contexts = tensor(name, "contexts", contexts, "[M, n]", (1, 2))
        contexts = contexts[:, None] if contexts.ndim == 1 else contexts
        count, self.length = contexts.shape
        if self.length > _LONGEST:
            fail(name, "contexts", f"have 1 to {_LONGEST} tokens", self.length, "Track the last ones")
        completions = tensor(name, "completions", completions, "[M]", (1,))
        self.p = tensor(name, "probabilities", probabilities, "[M]", (1,)).double()
        for what, of in (("completions", completions), ("probabilities", self.p)):
            if len(of) != count:
                fail(name, what, f"have one entry for each of {count} contexts", len(of), "Pass lists of one length")
        for what, ids in (("contexts", contexts), ("completions", completions)):
            if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= min(vocab_size, 1 << _BITS):
                got = f"{ids.dtype} in {int(ids.min())}..{int(ids.max())}"
                fail(name, what, f"hold token ids in 0..{vocab_size - 1}", got, "Check the tokenizer")
        if float(self.p.min()) <= 0 or float(self.p.max()) > 1:
            got = f"{float(self.p.min()):.3g}..{float(self.p.max()):.3g}"
            fail(name, "probabilities", "be above 0 and at most 1", got, "Track n-grams that the corpus has")
        self.keys, self.context = torch.unique(_keys(contexts[None])[0, :, -1], return_inverse=True)
        self.order = self.context.argsort(stable=True)  # n-grams by context, of which context m has
        self.starts = torch.nn.functional.pad(self.context.bincount(minlength=len(self.keys)).cumsum(0), (1, 0))
        tokens, self.completion = torch.unique(completions, return_inverse=True)
        where = torch.stack([tokens, torch.arange(len(tokens), device=tokens.device)])
        ones = torch.ones(len(tokens), device=tokens.device)
        shape = (vocab_size, len(tokens))
        self.features = sparse_matrix(where, ones, shape).coalesce()
        self.vocab, self.size = vocab_size, count

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Soft counts of every n-gram, and the weight of its context's rows, [M]."""
        s, w, ids = statistics.features, statistics.weight, statistics.input_ids
        assert s is not None
        seen = torch.nn.functional.pad(ids, (self.length - 1, 0), value=-1).unfold(1, self.length, 1)  # [B, T, n]
        key = _keys(seen)[..., -1].contiguous()
        at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        live = (self.keys[at] == key) & (seen >= 0).all(-1)
        by = torch.where(live, w, 0.0).reshape(-1)
        row = by.nonzero()[:, 0]
        of = at.reshape(-1)[row]
        count = self.starts[of + 1] - self.starts[of]
        # every such row with every n-gram of its context
        row, first = (
            row.repeat_interleave(count),
            (self.starts[of] - (count.cumsum(0) - count)).repeat_interleave(count),
        )
        gram = self.order[first + torch.arange(len(row), device=row.device)]
        found = s.reshape(len(by), -1)[row, self.completion[gram]].double()
        none = by.new_zeros(self.size)
        return none.index_add(0, gram, by[row] * found), none.index_add(0, gram, by[row])

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of c [M]."""
        return (share * (mean - self.p).square() / self.p).sum()


def _keys(tokens: Tensor) -> Tensor:
    """One number for each n tokens [..., n], running: the last is that of them all."""
    out = [tokens[..., 0]]
    for place in range(1, tokens.shape[-1]):
        out.append((out[-1] << _BITS) + tokens[..., place])
    return torch.stack(out, -1)


class Entropy(DistributionTerm):
    """J = (mean H - h)², H_n = -<q_n, log q_n>; dH_n/dq_n = -(log q_n + 1).

    value: h in nats, the corpus' entropy; or calibration=True: h is the rows' own mean cross-entropy on the text,
    held fixed (else the text would be made less likely to meet it). A calibrated model's mean entropy is its mean
    cross-entropy (Braverman et al., arXiv:1906.05664). Cost: none beside the pass. A mean hides its spread: two rows
    of entropies 0 and 2 h are as good as two of h.
    """

    entropy = True

    def __init__(self, value: float | None = None, calibration: bool = False) -> None:
        if (value is None) == (not calibration):
            got = f"value={value!r}, calibration={calibration!r}"
            fail("Entropy", "value or calibration=True", "be given, one of them", got, "Entropy(value=3.0)")
        known: Any = value
        if value is not None and (isinstance(known, bool) or not isinstance(known, (int, float)) or not known >= 0):
            fail("Entropy", "value", "be a number of nats of at least 0", repr(value), "Entropy(value=3.0)")
        self.of, self.log_prob, self.size = value, calibration, 2 if calibration else 1

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """sum_n w_n H_n, and of the cross-entropy where it is asked for."""
        w, found = statistics.weight, [statistics.entropy]
        if self.log_prob:
            assert statistics.log_prob is not None
            found.append(-statistics.log_prob.detach())
        return torch.stack([(w * each).sum() for each in found if each is not None]), w.sum()

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of mean H [1], or of mean H and mean cross-entropy [2]."""
        return (mean[0] - (mean[1].detach() if self.of is None else self.of)).square()
