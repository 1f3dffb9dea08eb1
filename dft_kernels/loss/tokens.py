"""`token_statistics`: what reinforcement learning asks of given tokens, at the temperature that they were drawn at."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.contract import Row
from ..errors import fail
from . import autograd
from .build import build
from .options import TOKENS, Function, TokenOptions, documented
from .problem import Problem

if TYPE_CHECKING:
    from typing_extensions import Unpack

TOKEN_STATISTICS = Function("token_statistics", TOKENS, own=("outputs",), statistics=True, labelled=True)
OUTPUTS = {  # of `TokenStatistics`: the row quantities that each is made of
    "log_prob": (Row.LOG_PROB,),
    "entropy": (Row.ENTROPY,),
    "lse": (Row.LSE,),
    "log_sum_sq_probs": (Row.LSE,),
    "mean_logits": (Row.MEAN_LOG_PROB, Row.LSE),
    "is_top1": (Row.CORRECT,),
}


@dataclass(frozen=True)
class TokenStatistics:
    """Of every token, in hidden's leading shape, fp32 (fp64 for fp64); 0 or False for ignored rows, None where it was
    not asked for. log_prob, entropy and lse are differentiable, the others detached."""

    log_prob: Tensor | None  # log q_n[target_n]
    entropy: Tensor | None  # -<q_n, log q_n>
    lse: Tensor | None  # logsumexp(z_n / T)
    log_sum_sq_probs: Tensor | None  # log <q_n, q_n>
    mean_logits: Tensor | None  # mean of z_n / T over the vocabulary
    is_top1: Tensor | None  # the target is the argmax of z_n


@documented(TOKEN_STATISTICS)
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    outputs: Collection[str] = ("log_prob", "entropy"),
    **options: Unpack[TokenOptions],
) -> TokenStatistics:
    """Log-probability, entropy and more of given tokens at a temperature, never holding the [N, V] logits.

        z = cap(logit_scale * (hidden @ weight.T + down @ up.T + bias)),  cap(x) = softcap * tanh(x / softcap)
        q = softmax(z / temperature)
        log_prob_n = log q_n[target_n]       entropy_n = -<q_n, log q_n>        lse_n = logsumexp(z_n / temperature)
        log_sum_sq_probs_n = log <q_n, q_n>  mean_logits_n = sum_v z_nv / (V temperature)
        is_top1_n: target_n is the argmax of z_n

    What policy-gradient methods need of sampled tokens, as PPO (arXiv:1707.06347) and GRPO (arXiv:2402.03300). Unlike
    in the losses, temperature is of everything here. log_prob, entropy and lse are differentiable in hidden, weight,
    bias and low_rank, and any scalar of them is an ordinary PyTorch loss; no gradient flows through the others.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64; weight: [V, H] of the same dtype; bias: [V].
        target: [...] int64; a row whose target is ignore_index is left out of every product and gives 0, and False.
        outputs: names of what to compute: log_prob, entropy, lse, log_sum_sq_probs, mean_logits, is_top1.
        temperature: greater than 0. Other keywords: as in `linear_distribution_loss`.

    Returns:
        `TokenStatistics`, of hidden's leading shape, fp32 (fp64 for fp64), is_top1 bool; None for what was not asked.

    Raises:
        ValueError, TypeError: a wrong argument, before any work is done. RuntimeError: double backward.

    mean_logits and log_sum_sq_probs are differences of log-sum-exps, exact to an ulp of these.

    Memory: O(chunk x V) scratch; backward adds the returned gradients, and fp32 [V, H] where there are several chunks.
    FLOPs: 2NHV a product; 1 product forward (2 with log_sum_sq_probs, the log-sum-exp at half the temperature), 3
    backward, one less for each of hidden and weight that needs no gradient.
    """
    unknown = [name for name in outputs if name not in OUTPUTS] if _names(outputs) else [outputs]
    if unknown:
        relation = f"be some of {', '.join(OUTPUTS)}"
        fail("token_statistics", "outputs", relation, repr(unknown[0]), "Pass a tuple of these names")
    wanted = {row for name in outputs for row in OUTPUTS[name]}
    problem = _heated(build(TOKEN_STATISTICS, hidden, weight, target, None, options, rows=_bits(wanted)))
    rows, lead = autograd.outside_graph(autograd.statistics, problem)(problem), hidden.shape[:-1]

    def row(which: Row) -> Tensor:
        return rows[which.value].reshape(lead)

    def output(name: str) -> Any:
        if name not in outputs:
            return None
        if name == "mean_logits":
            return (row(Row.MEAN_LOG_PROB) + row(Row.LSE)).detach()
        if name == "log_sum_sq_probs":
            return (_lse_of_twice(problem).reshape(lead) - 2.0 * row(Row.LSE)).detach()
        found = row(OUTPUTS[name][0])
        return found.bool() if name == "is_top1" else found

    return TokenStatistics(**{name: output(name) for name in OUTPUTS})


def _names(outputs: Any) -> bool:
    return isinstance(outputs, Collection) and not isinstance(outputs, str)


def _bits(rows: set[Row]) -> int:
    return sum(1 << row for row in rows)


def _heated(problem: Problem) -> Problem:
    """With the temperature in the head's constants: z / T = c tanh(s raw / c), s = logit_scale / T, c = softcap / T"""
    return _scaled(problem, 1.0 / problem.temperature)._replace(temperature=1.0)


def _scaled(problem: Problem, factor: float) -> Problem:
    """With `factor` times the logits."""
    softcap = None if problem.softcap is None else problem.softcap * factor
    return problem._replace(logit_scale=problem.logit_scale * factor, softcap=softcap)


@torch.no_grad()
def _lse_of_twice(problem: Problem) -> Tensor:
    """logsumexp(2 z) [N]"""
    twice = _scaled(problem, 2.0)._replace(reported=_bits({Row.LSE}))
    return autograd.outside_graph(autograd.statistics, twice)(twice)[Row.LSE.value]
