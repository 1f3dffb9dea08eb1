"""Terms at running means, at the cost of no further matrix product."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..loss.functional import DistributionStatistics, linear_distribution_loss, linear_distribution_statistics
from ..loss.metrics import Metrics
from .base import Statistics, as_sum
from .constraint import AtMost
from .pull import (
    STATISTICS,
    Potentials,
    Slopes,
    TermLoss,
    cast,
    checked,
    filled,
    joined,
    linear_part,
    of_rows,
    pull,
    rows_of,
    slopes,
    summed,
    wide,
    with_whole_mean,
)


class Delayed:
    """Terms at running means: the loss's own pass computes the statistics of a step, without another matrix product.

        running = decay * running + sums of this step        (an average whose weights are the rows', unbiased at once)

    and the potential of a step is J's gradient at the running means of the steps before: independent of the rows it is
    applied to, so that it needs no cross-fitting, and as old as 1 / (1 - decay) steps. Until the first `update` the
    terms are 0 (`observe` fills them before training). With running means equal to this batch's, its gradient is
    `exact`'s. Take weights from `gains`, and kinds of terms whose pull fades at the target (squares): where they pull
    much harder than cross-entropy holds, means that are late make a model swing about the target.

        delayed = Delayed(0.1 * TokenL2(t) + 0.02 * SentenceLength(ends, hazard))
        for step in training:
            for batch in step:                                    # gradient accumulation
                out = delayed.loss(hidden, weight, target, input_ids=ids, num_items=rows_of_the_step)
                out.loss.backward()
            optimizer.step()
            delayed.update()                                      # one reduction over processes

    A loop that calls the loss elsewhere takes `arguments` before and `collect` after it. Memory: V and a few numbers in
    float64, twice; [rows, K] for terms with K features. FLOPs: those of the loss and its row operations.
    """

    def __init__(self, term: Any, decay: float = 0.9) -> None:
        self.terms = as_sum("Delayed", term)
        for name, (_, part) in zip(self.terms.names, self.terms.parts, strict=True):
            if not part.linear:
                remedy = "Use kind='hazard', or exact()"
                fail("Delayed", "term", "have statistics linear in the model's probabilities", name, remedy)
        known: Any = decay
        if isinstance(known, bool) or not isinstance(known, (int, float)) or not 0 <= known < 1:
            fail("Delayed", "decay", "lie in 0..1, below 1", repr(decay), "The default is 0.9")
        self.decay = float(decay)
        self.steps = 0
        self.running: Tensor | None = None  # Moments.flat
        self.pending: Tensor | None = None  # of this step
        self._slopes: Slopes | None = None  # at the running means, from the first call of a step on

    def arguments(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        return_metrics: bool = False,
        **loss: Any,
    ) -> dict[str, Any]:
        """Keywords that `linear_distribution_loss` takes beside these: potentials of the running means, and what makes
        its metrics hold the statistics that `collect` adds up (return_metrics: and all others)."""
        terms, rows = checked("Delayed", self.terms, hidden, weight, target, input_ids, loss)
        lead, shape = hidden.shape[:-1], rows.weight.shape
        features = terms.features
        there = {"features": features is not None, "mean_probability": terms.columns, "entropy": terms.entropy,
                 "log_prob": terms.log_prob}  # fmt: skip
        out: dict[str, Any] = {"return_metrics": return_metrics or {"lse", *(name for name in there if there[name])}}
        asked: Potentials | None = None
        known = self._known(hidden.device)
        if known is not None:
            zero = rows.weight.new_zeros(())
            none = None if features is None else zero.to(wide(hidden)).expand(*shape, features.shape[1])
            (blank,) = filled(terms, [rows], none, zero.expand(shape), zero.expand(shape), shape)
            asked = pull(terms, known, blank)
        if terms.columns:
            potential = hidden.new_zeros(1, weight.shape[0]) if asked is None else asked.columns
            assert potential is not None
            group = torch.zeros(lead, dtype=torch.int64, device=hidden.device)
            out |= {"potential": potential.reshape(1, -1), "group": group}
        if features is not None:
            kappa = None if asked is None else asked.features
            kappa = hidden.new_zeros(*lead, features.shape[1]) if kappa is None else kappa.reshape(*lead, -1)
            out |= {"features": features, "feature_weight": kappa}
        if terms.entropy:
            eta = None if asked is None else asked.entropy
            out["entropy_weight"] = hidden.new_zeros(lead) if eta is None else eta.reshape(lead)
        return cast(out, hidden)

    def collect(
        self,
        metrics: Metrics,
        target: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        row_weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Statistics:
        """Add the statistics of a micro-batch, out of the metrics of its loss, to the step's; under no_grad, as in
        evaluation, they are left out of it."""
        assert metrics.lse is not None
        rows = rows_of(metrics.lse, target, input_ids, row_weight, ignore_index)
        seen = self._seen(rows, metrics)
        if torch.is_grad_enabled():
            self._add(seen)
        return seen

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        teacher: Any = None,
        *,
        input_ids: Tensor | None = None,
        return_metrics: bool = False,
        **loss: Any,
    ) -> TermLoss:
        """The fused loss plus J of the running means; the arguments are `exact`'s."""
        given = self.arguments(hidden, weight, target, input_ids=input_ids, return_metrics=return_metrics, **loss)
        fused, metrics = linear_distribution_loss(hidden, weight, target, teacher, **{**loss, **given})
        metrics = with_whole_mean(metrics, weight)
        seen = self.collect(metrics, target, input_ids=input_ids, **of_rows(loss))
        shape = seen.weight.shape
        kappa, eta = given.get("feature_weight"), given.get("entropy_weight")
        asked = Potentials(
            given["potential"][0] if "potential" in given else None,
            None if kappa is None else kappa.reshape(*shape, -1),
            None if eta is None else eta.reshape(shape),
        )
        known = self._known(hidden.device)
        values = [seen.weight.new_zeros(())] * len(self.terms.parts) if known is None else known.values
        total = seen.weight.sum()
        return joined(
            self.terms,
            fused,
            linear_part(asked, seen),
            values,
            total,
            loss.get("num_items"),
            metrics if return_metrics else None,
        )

    @torch.no_grad()
    def observe(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        **loss: Any,
    ) -> None:
        """Add a batch to the step's statistics without a loss, by one product: to fill the means before training."""
        terms, rows = checked("Delayed", self.terms, hidden, weight, target, input_ids, loss)
        asked = {name: loss[name] for name in STATISTICS if name in loss}
        found = linear_distribution_statistics(hidden, weight, target, features=terms.features, **asked)
        self._add(self._seen(rows, with_whole_mean(found, weight)))

    def update(self) -> None:
        """End a step: sum its statistics over all processes (each must call this), fold them into the running ones, or
        leave these as they were where a number is not finite."""
        if self.pending is None:
            if self.running is None:
                remedy = "Call loss, collect or observe in every process before the first update"
                fail("Delayed.update", "a batch", "have been seen", "none", remedy)
            self.pending = torch.zeros_like(self.running)
        pending = summed(self.pending)
        pending = torch.where(pending.isfinite().all(), pending, 0.0)  # no synchronisation
        self.running = pending if self.running is None else self.decay * self.running.to(pending.device) + pending
        self.pending, self._slopes, self.steps = None, None, self.steps + 1
        if self.bounded:
            self.terms.on(self.running.device)
            means = self.terms.means(self.terms.split(self.running))
            for (_, term), of in zip(self.terms.parts, means, strict=True):
                if isinstance(term, AtMost):
                    term.rise(*of, settled=self.settled)

    @property
    def settled(self) -> bool:
        """Whether the running means are of as many steps as they look back on, 1 / (1 - decay) of them or more."""
        return self.steps * (1 - self.decay) >= 1

    @property
    def bounded(self) -> dict[str, AtMost]:
        """The constraints among the terms, by name: their dual weights and J / bound."""
        parts = zip(self.terms.names, self.terms.parts, strict=True)
        return {name: term for name, (_, term) in parts if isinstance(term, AtMost)}

    def values(self) -> dict[str, Tensor]:
        """weight_i J_i of the running means, by name; empty before the first update."""
        known = None if self.running is None else self._known(self.running.device)
        return {} if known is None else dict(zip(self.terms.names, known.values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The running statistics, for a checkpoint between steps; a step that is under way is not in it."""
        running = None if self.running is None else self.running.clone()
        duals = [term.dual for term in self.bounded.values()]
        return {"running": running, "steps": self.steps, "terms": self._layout(), "duals": duals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. ValueError where it is of other terms or another vocabulary."""
        if not isinstance(state, dict) or set(state) != {"running", "steps", "terms", "duals"}:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            fail("Delayed.load_state_dict", "state", "be what state_dict returned", got, "Pass that dict")
        running, steps, duals = (state[name] for name in ("running", "steps", "duals"))
        known = type(steps) is int and steps >= 0 and isinstance(duals, list)
        if not known or not all(type(dual) is float and 0 <= dual < math.inf for dual in duals):
            relation = "have steps, an int of at least 0, and duals, a list of finite floats of at least 0"
            wrong = f"{steps!r} and {duals!r}"
            fail("Delayed.load_state_dict", "state", relation, wrong, "Pass what state_dict returned")
        if state["terms"] != self._layout() or len(duals) != len(self.bounded):
            remedy = "Build the terms as they were, or start without the state"
            fail("Delayed.load_state_dict", "state", f"be of the terms {self._layout()}", state["terms"], remedy)
        if running is not None and (not isinstance(running, Tensor) or running.dtype != torch.float64):
            wrong = str(running.dtype) if isinstance(running, Tensor) else type(running).__name__
            remedy = "Pass what state_dict returned"
            fail("Delayed.load_state_dict", "state", "have running means in float64, or None", wrong, remedy)
        if running is not None:
            vocab = running.numel() - 1 - 2 * self.terms.size
            if running.ndim != 1 or vocab < 0 or (vocab and not self.terms.columns):
                remedy = "Pass what state_dict returned"
                wanted = f"have running means [1 + V + 2 * {self.terms.size}]"
                fail("Delayed.load_state_dict", "state", wanted, list(running.shape), remedy)
            if self.terms.columns and self.terms.vocab not in (None, vocab):
                remedy = "Load the state of the same head"
                fail("Delayed.load_state_dict", "state", f"be of a vocabulary of {self.terms.vocab}", vocab, remedy)
            running = running.clone()
        for term, dual in zip(self.bounded.values(), duals, strict=True):
            term.dual = min(dual, term.most)
        self.running, self.steps, self.pending, self._slopes = running, steps, None, None

    def _seen(self, rows: Statistics, found: Metrics | DistributionStatistics) -> Statistics:
        """The rows with their statistics out of a pass over them. Features behind the terms' own are left out."""
        if found.mean_probability is not None:
            rows = replace(rows, columns=rows.weight.sum() * found.mean_probability[0].detach().double())
        features = found.features
        if features is not None and self.terms.features is not None:
            features = features[..., : self.terms.features.shape[1]]
        divergence = found.divergence if isinstance(found, DistributionStatistics) else None
        shape = rows.weight.shape
        (seen,) = filled(self.terms, [rows], features, found.entropy, found.log_prob, shape, divergence)
        return seen

    @torch.no_grad()
    def _add(self, seen: Statistics) -> None:
        """Add the sums of rows to the step's."""
        found = self.terms.gathered(seen).flat()
        self.pending = found if self.pending is None else self.pending + found

    def _known(self, device: torch.device) -> Slopes | None:
        """J and its gradient at the running means, once a step."""
        if self.running is not None and self._slopes is None:
            self.terms.on(device)
            self.running = self.running.to(device)
            self._slopes = slopes(self.terms, self.terms.split(self.running))
        return self._slopes

    def _layout(self) -> list[str]:
        parts = zip(self.terms.names, self.terms.parts, strict=True)
        return [f"{name}[{part.vocab if part.columns else part.size}]" for name, (_, part) in parts]
