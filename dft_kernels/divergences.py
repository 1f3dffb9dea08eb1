"""The table of divergences between a target distribution p (the teacher) and the model's q.

Every entry is separable, D(p, q) = sum_v f(log q_v, log p_v), so a backend needs one pair of elementwise
functions for it: f, written so that no addend is negative, and g = df / dlog q. The gradient follows:

    dD/dz_v = (g_v - q_v * sum_u g_u) / T        for q = softmax(z / T)

This module is the law: names, parameters, formulas and ids. The backends hold the pairs, and a test walks
`TABLE` over every backend.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "TABLE",
    "Divergence",
    "Entry",
    "alpha_divergence",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
]

_OPEN_UNIT = "lie strictly between 0 and 1"


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameter, as the functions of this module return it.

    name: a key of `TABLE`. parameter: its one number (0.0 for a divergence that takes none). The range is
    checked by the loss that is given it.
    """

    name: str
    parameter: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One line of the table: what every backend must implement under `id`, and what users may pass."""

    id: int
    name: str
    formula: str
    source: str
    parameter: str = ""  # the parameter's name; "" where there is none
    default: float = 0.0
    domain: str = ""  # the RELATION of an error message

    def admits(self, value: float) -> bool:
        """Whether `value` is inside the parameter's domain."""
        if self.domain == _OPEN_UNIT:
            return 0.0 < value < 1.0
        if self.name == "alpha_divergence":
            return value not in (0.0, 1.0) and abs(value) < float("inf")
        return value == 0.0

    def finite_at_zero(self, value: float) -> bool:
        """Whether D with this parameter is finite where p = 0 < q."""
        return not (self.name == "reverse_kl" or (self.name == "alpha_divergence" and value < 0))


TABLE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(0, "forward_kl", "KL(p‖q) = sum p (log p - log q) - p + q", "Hinton et al., arXiv:1503.02531"),
        Entry(1, "reverse_kl", "KL(q‖p) = sum q (log q - log p) - q + p", "MiniLLM, arXiv:2306.08543"),
        Entry(
            2,
            "jensen_shannon",
            "beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q",
            "GKD, arXiv:2306.13649",
            "beta",
            0.5,
            _OPEN_UNIT,
        ),
        Entry(
            3,
            "skew_kl",
            "KL(p‖alpha p + (1 - alpha) q)",
            "DistiLLM, arXiv:2402.03898",
            "alpha",
            0.1,
            _OPEN_UNIT,
        ),
        Entry(
            4,
            "skew_reverse_kl",
            "KL(q‖alpha q + (1 - alpha) p)",
            "DistiLLM, arXiv:2402.03898",
            "alpha",
            0.1,
            _OPEN_UNIT,
        ),
        Entry(
            5,
            "alpha_divergence",
            "(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))",
            "Cichocki and Amari, Entropy 12 (2010) 1532-1568",
            "alpha",
            0.5,
            "be finite and neither 0 nor 1",
        ),
        Entry(6, "total_variation", "1/2 sum |p - q|", "f-distill, arXiv:2307.15190"),
        Entry(7, "squared_hellinger", "1/2 sum (sqrt p - sqrt q)^2", "Hellinger, J. reine angew. Math. 136 (1909)"),
    )
}


def forward_kl() -> Divergence:
    """KL(p‖q) = sum_v p (log p - log q): covers every mode of the target. dD/dz = (q - p) / T."""
    return Divergence("forward_kl")


def reverse_kl() -> Divergence:
    """KL(q‖p) = sum_v q (log q - log p): seeks modes; +inf where q > 0 = p. dD/dz = q (r - <q, r>) / T, r = log q/p."""
    return Divergence("reverse_kl")


def jensen_shannon(beta: float = 0.5) -> Divergence:
    """beta KL(p‖m) + (1 - beta) KL(q‖m) with m = beta p + (1 - beta) q, 0 < beta < 1 (GKD, arXiv:2306.13649).

    At beta = 1/2 it is the symmetric Jensen-Shannon divergence, at most log 2.
    """
    return Divergence("jensen_shannon", float(beta))


def skew_kl(alpha: float = 0.1) -> Divergence:
    """KL(p‖alpha p + (1 - alpha) q), 0 < alpha < 1: at most -log alpha (DistiLLM, arXiv:2402.03898)."""
    return Divergence("skew_kl", float(alpha))


def skew_reverse_kl(alpha: float = 0.1) -> Divergence:
    """KL(q‖alpha q + (1 - alpha) p), 0 < alpha < 1: at most -log alpha (DistiLLM, arXiv:2402.03898)."""
    return Divergence("skew_reverse_kl", float(alpha))


def alpha_divergence(alpha: float = 0.5) -> Divergence:
    """(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)), alpha neither 0 nor 1.

    alpha -> 1 is forward KL and alpha -> 0 reverse KL; alpha = 1/2 is four times the squared Hellinger
    distance; alpha = 2 half of the chi-squared divergence of p from q. +inf where q = 0 < p for alpha > 1 and
    where p = 0 < q for alpha < 0. Summed as (p^alpha q^(1 - alpha) - alpha p - (1 - alpha) q) / (alpha
    (alpha - 1)), whose addends are never negative (Cichocki and Amari, Entropy 12 (2010) 1532-1568).
    """
    return Divergence("alpha_divergence", float(alpha))


def total_variation() -> Divergence:
    """1/2 sum |p - q|, between 0 and 1. Its gradient jumps where p_v = q_v; there it is taken as 0."""
    return Divergence("total_variation")


def squared_hellinger() -> Divergence:
    """1/2 sum (sqrt p - sqrt q)^2, between 0 and 1."""
    return Divergence("squared_hellinger")
