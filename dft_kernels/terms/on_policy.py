"""Terms of text that the model generates: row statistics, and the score-function term of each sampled token.

A statistic of what a model writes changes in two ways: each row's q moves, and with it which rows there are. With
c_m = w_m dJ/dw_m the part of J that row m brings (linearised at the running means), for a text y drawn from the model

    grad E[sum_m c_m] = E[ sum_m (grad of c_m at a fixed text) + sum_n grad log q_n(y_n) (R_n - b_n) ],
    R_n = sum_{m > n} c_m

(Williams, Machine Learning 8, 1992). Where no token changes what comes after, only the first part is there; leaving the
second out elsewhere is biased. What a text is like as a whole (`TextMMD`) is in every R_n, and in no other part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..loss.functional import DistributionStatistics, linear_distribution_statistics
from .base import DistributionTerm, Statistics
from .delayed import Delayed
from .pull import STATISTICS, Slopes, TermLoss, checked, pull, wide


class ReferenceKL(DistributionTerm):
    """J = mean KL(q_n || r_n) on the model's own text, r the reference that `OnPolicy.loss` has as teacher: the anchor
    that keeps a model near where it started while a term pulls. KL(q || r) per token of whole texts, with the score
    term that is part of its gradient. Cost: the reference's product, forward and backward."""

    divergence = True
    size = 1

    def moments(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """sum_n w_n KL_n [1]."""
        assert statistics.divergence is not None
        return (statistics.weight * statistics.divergence).sum().reshape(1), statistics.weight.sum()

    def value(self, mean: Tensor, share: Tensor) -> Tensor:
        """Of the mean [1]."""
        return mean[0]


class OnPolicy(Delayed):
    """`Delayed` terms of text that the model has written: J's gradient at the running means of earlier rollouts, for
    the rows of these, and by the score term for what each token led to.

        own = OnPolicy(5.0 * TokenL2(t) + 0.05 * ReferenceKL())
        for step in training:
            ids, target = ...                                     # drawn from the model: rows of new tokens have labels
            own.loss(hidden, weight, target, reference, input_ids=ids).loss.backward()
            optimizer.step()
            own.update()

    b_n: the mean of the other sequences' R_n at the same place (leave-one-out: Kool et al., ICLR 2019 workshop
    "Buy 4 REINFORCE Samples, Get a Baseline for Free!"), so align what continues prompts. Slopes, baseline and
    denominators know nothing of a sequence's own draws: the gradient is in expectation a positive multiple of J's at
    the running means, exactly its where all rollouts are as long.

    temperature: at which the text is drawn: rows are softmax(z / temperature). A sampler that cuts (top-p, top-k) draws
    from no row's q; what it writes has no score here. biased_without_score: leave the score term out: less variance,
    and another gradient than J's.
    """

    def __init__(
        self, term: Any, decay: float = 0.9, temperature: float = 1.0, biased_without_score: bool = False
    ) -> None:
        super().__init__(term, decay)
        known: Any = temperature
        if isinstance(known, bool) or not isinstance(known, (int, float)) or not 0 < known < float("inf"):
            fail("OnPolicy", "temperature", "be a number above 0", repr(temperature), "The sampler's is meant")
        if biased_without_score and self.terms.reads is not None:
            remedy = "Leave it, or leave the TextMMD out"
            fail("OnPolicy", "biased_without_score", "be False with a TextMMD, which is all score", "True", remedy)
        self.temperature = float(temperature)
        self.biased_without_score = biased_without_score

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        teacher: Any = None,
        *,
        input_ids: Tensor | None = None,
        texts: Sequence[str] | None = None,
        return_metrics: bool = False,
        sampled_log_prob: Tensor | None = None,
        **loss: Any,
    ) -> TermLoss:
        """J of the running means, with the gradient above; 0 with none before the first `update`.

        Args:
            hidden: [B, T, H], of two sequences or more; weight: [V, H].
            target: [B, T] int64, the token that was drawn after each row, ignore_index where none was: at prompts,
                after the end.
            teacher: the reference of a `ReferenceKL`, any teacher of `linear_distribution_loss`.
            input_ids: [B, T] int64, where a term asks for it.
            texts: what was drawn, B texts, where a term reads it (`TextMMD`).
            sampled_log_prob: [B, T], log-probabilities of the drawn tokens under the policy that drew them (an earlier
                state of the model, another engine): rows then weigh min(10, prod_{m < n} q_m(y_m) / mu_m(y_m)),
                truncated importance weights (Ionides, J. Comput. Graph. Stat. 17(2), 2008). One product more.
            loss: bias, low_rank, logit_scale, softcap, ignore_index, row_weight (above 0 where a token was drawn),
                num_items, chunking and backend as in `linear_distribution_loss`; its other keywords say nothing here.

        Returns: `TermLoss`; fused is 0, and there are no metrics. Raises ValueError or TypeError for a wrong argument
        before any work. Memory: O(chunk x V), [V] and [B, T, K + 1]. FLOPs: 4 products, and with a ReferenceKL the
        reference's twice.
        """
        terms, rows = checked("OnPolicy", self.terms, hidden, weight, target, input_ids, loss, own_text=True)
        asked = {name: loss[name] for name in STATISTICS if name in loss}
        asked["logit_scale"] = asked.get("logit_scale", 1.0) / self.temperature
        if asked.get("softcap") is not None:
            asked["softcap"] /= self.temperature
        assert isinstance(target, Tensor) or target is None
        drawn = self._drawn(target, rows, loss)
        if (teacher is None) == terms.divergence:
            got = "None" if teacher is None else type(teacher).__name__
            relation = "be the reference of a ReferenceKL" if terms.divergence else "be None without a ReferenceKL"
            fail("OnPolicy", "teacher", relation, got, "Pass the model that this one is kept near, or leave both out")
        lead, shape = hidden.shape[:-1], rows.weight.shape
        phi = self._read(texts, rows.weight)
        through = torch.ones_like(rows.weight)  # importance of the text up to each row's own token
        if sampled_log_prob is not None:
            if not isinstance(sampled_log_prob, Tensor) or sampled_log_prob.shape != lead:
                shaped = list(sampled_log_prob.shape) if isinstance(sampled_log_prob, Tensor) else "none"
                fail("OnPolicy", "sampled_log_prob", f"be a tensor {list(lead)}", shaped, "One number for each row")
            with torch.no_grad():
                known = linear_distribution_statistics(hidden, weight, target, **asked).log_prob
            assert known is not None
            moved = torch.where(drawn, (known - sampled_log_prob).reshape(shape).double(), 0.0)
            through = moved.cumsum(1).exp().clamp(max=10.0)
            before = (moved.cumsum(1) - moved).exp().clamp(max=10.0)
            rows = replace(rows, weight=rows.weight * before)
            asked["row_weight"] = rows.weight.reshape(lead).to(wide(hidden))
        rows = replace(rows, texts=phi, text_weight=through[:, -1])
        of = self._known(hidden.device)
        found = linear_distribution_statistics(
            hidden,
            weight,
            target,
            teacher,
            features=self._features(of, wide(hidden)),
            divergence="reverse_kl",
            teacher_temperature=self.temperature,
            **asked,
        )
        seen = self._seen(rows, found)
        if torch.is_grad_enabled():
            self._add(seen)
        assert found.log_prob is not None
        log_prob = found.log_prob.double().reshape(shape)
        values = [rows.weight.new_zeros(())] * len(terms.parts)
        surrogate = 0 * log_prob.sum()  # so that there is a graph in every process
        if of is not None:
            values = of.values
            surrogate = self._surrogate(of, seen, found, log_prob, drawn, through, loss.get("num_items"))
        total = sum(values[1:], values[0])
        surrogate = surrogate.to(found.entropy.dtype)
        out = surrogate - surrogate.detach() + total.detach().to(surrogate.dtype)
        named = dict(zip(terms.names, (value.detach() for value in values), strict=True))
        return TermLoss(out, torch.zeros_like(out.detach()), named, None)

    def _drawn(self, target: Tensor | None, rows: Statistics, loss: dict[str, Any]) -> Tensor:
        """[B, T] bool: after which rows a token was drawn."""
        if target is None:
            fail("OnPolicy", "target", "be the tokens that were drawn", "None", "Pass them, ignore_index elsewhere")
        drawn = (target != loss.get("ignore_index", -100)).reshape(rows.weight.shape)
        if len(drawn) < 2 or not bool(drawn.any(1).all()):
            got = f"{int(drawn.any(1).sum())} of {len(drawn)}"
            fail("OnPolicy", "target", "have two sequences or more, each with a label", got, "Draw more of them")
        if bool((rows.weight[drawn] <= 0).any()):
            got = f"{float(rows.weight[drawn].min()):g}"
            fail("OnPolicy", "row_weight", "be above 0 where a token was drawn", got, "Weigh it by little, not by 0")
        return drawn

    def _read(self, texts: Any, like: Tensor) -> Tensor | None:
        """phi of whole texts [B, R], where a term reads them."""
        if (texts is None) == (self.terms.reads is not None):
            got = "None" if texts is None else f"{len(texts)} texts"
            relation = "be what was drawn, for a TextMMD" if texts is None else "be None without a TextMMD"
            fail("OnPolicy", "texts", relation, got, "Pass one text for each sequence, or leave both out")
        if texts is None or self.terms.reads is None:
            return None
        if isinstance(texts, str) or len(texts) != len(like):
            got = "one text" if isinstance(texts, str) else f"{len(texts)} of them"
            fail("OnPolicy", "texts", f"be one for each of {len(like)} sequences", got, "Decode what each has drawn")
        return self.terms.reads(texts).to(like.device)

    def _features(self, of: Slopes | None, dtype: torch.dtype) -> Tensor | None:
        """The terms' features, and G as one more column: <q_n, G> is row n's part of the column terms."""
        own = None if self.terms.features is None else self.terms.features.to(dtype)
        if of is None or of.columns is None or not self.terms.columns:
            return own
        g = (of.columns * of.total).to(dtype)[:, None]
        return g if own is None else torch.cat([own, g.to_sparse_coo()], 1).coalesce()

    def _surrogate(
        self,
        of: Slopes,
        seen: Statistics,
        found: DistributionStatistics,
        log_prob: Tensor,
        drawn: Tensor,
        through: Tensor,
        items: Any,
    ) -> Tensor:
        """A scalar whose gradient is the estimate of J's."""
        terms, w = self.terms, seen.weight
        asked = pull(terms, of, seen)
        row = torch.zeros_like(w)  # w_n (<q_n, G> + <s_n, kappa_n> + ...), by which each row moves J
        g = torch.zeros_like(w)
        if terms.columns and of.columns is not None:
            assert found.features is not None
            g = found.features[..., -1].double().reshape(w.shape)
            row = row + w * g
        if asked.features is not None and seen.features is not None:
            row = row + w * (asked.features * seen.features).sum(-1)
        for potential, statistic in ((asked.entropy, seen.entropy), (asked.divergence, seen.divergence)):
            if potential is not None and statistic is not None:
                row = row + w * potential * statistic
        whole = w.sum(1, keepdim=True)
        others = len(w) / (len(w) - 1) * (w.sum() - whole)  # the denominator, by the other sequences alone
        denominator = others if items is None else torch.as_tensor(items, dtype=w.dtype, device=w.device)
        out = (row / denominator).sum()
        if self.biased_without_score:
            return out
        credit, whole_text = self._credit(of, seen)
        credit = credit + (w * g).detach()
        later = credit.sum(1, keepdim=True) - credit.cumsum(1) + whole_text
        baseline = (later.sum(0) - later) / (len(w) - 1)
        advantage = torch.where(drawn, later - through * baseline, 0.0)
        return out + (advantage / denominator * log_prob).sum()

    def _credit(self, of: Slopes, seen: Statistics) -> tuple[Tensor, Tensor]:
        """w_n dJ/dw_n [B, T] of all but the columns, times W, and the same of whole texts [B, 1]."""
        names = ("features", "entropy", "divergence")
        fixed = {name: value.detach() for name in names if (value := getattr(seen, name)) is not None}
        assert seen.text_weight is not None
        with torch.enable_grad():
            leaves = {name: getattr(seen, name).detach().requires_grad_() for name in ("weight", "text_weight")}
            moments = self.terms.gathered(replace(seen, **leaves, **fixed))
            pairs = ((moments.total, of.of_total), (moments.sums, of.sums), (moments.weights, of.weights))
            linear = [(moment * slope).sum() for moment, slope in pairs if slope is not None and moment.requires_grad]
            if not linear:
                return torch.zeros_like(seen.weight), torch.zeros_like(seen.text_weight)[:, None]
            found = torch.autograd.grad(sum(linear[1:], linear[0]), tuple(leaves.values()), materialize_grads=True)
        return seen.weight * found[0] * of.total, (seen.text_weight * found[1] * of.total)[:, None]
