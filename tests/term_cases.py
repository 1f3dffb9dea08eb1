"""Distribution terms with their formulas, written again and slowly, on full logits in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dft_kernels.terms import (
    ChiSquared,
    DistributionTerm,
    Entropy,
    NGrams,
    PunctuationGap,
    PunctuationRate,
    SentenceLength,
    TokenL2,
    UnigramKL,
    VocabularyMMD,
    random_fourier_features,
)

B, T, H, V, A = 4, 23, 8, 31, 5  # texts, tokens of each, hidden size, vocabulary, ages that a hazard has


def made(seed: int = 0) -> dict[str, Any]:
    """Hidden states, a head, a text of few words, labels with ignored rows, row weights."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T + 1), generator=draw)
    ids[torch.rand(B, T + 1, generator=draw) < 0.3] = 3  # a sentence ends
    target = ids[:, 1:].clone()
    target[1, 4:7] = -100
    target[2, -3:] = -100
    weight = torch.rand(B, T, generator=draw, dtype=torch.float64) + 0.5
    weight[3, 5] = 0.0
    return {
        "hidden": torch.randn(B, T, H, generator=draw, dtype=torch.float64).requires_grad_(),
        "weight": (torch.randn(V, H, generator=draw, dtype=torch.float64) * 0.5).requires_grad_(),
        "target": target,
        "input_ids": ids[:, :-1].contiguous(),
        "row_weight": weight,
    }


def draws(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


P = (draws(1, V) + 0.05) / (draws(1, V) + 0.05).sum()
EMBEDDINGS = draws(2, V, 6) - 0.5
ENDS = torch.zeros(V, dtype=torch.bool)
ENDS[[3, 7]] = True
MARKS = torch.stack([ENDS, torch.arange(V) == 11, torch.arange(V) % 5 == 0], 1)
HAZARD, HAZARDS = draws(3, A) * 0.5 + 0.1, draws(4, 3, A) * 0.5 + 0.1
LENGTHS = draws(5, A) / (draws(5, A).sum() * 1.3)  # some are longer
RATE = torch.tensor([0.1, 0.03, 0.2], dtype=torch.float64)
TRACKED = {"contexts": torch.tensor([3, 3, 5, 3, 17]), "completions": torch.tensor([1, 3, 3, 30, 0])}
TRACKED["probabilities"] = torch.tensor([0.2, 0.1, 0.3, 0.05, 0.5])
PAIRS = {**TRACKED, "contexts": torch.tensor([[3, 3], [3, 3], [5, 3], [3, 9], [30, 30]])}


# ------------------------------------------------------------------ the formulas, again and slowly, on full logits


class Rows:
    """Full logits: q [B, T, V] of the rows in play and their weights."""

    def __init__(self, given: dict[str, Any], keep: Tensor | None = None) -> None:
        self.z = given["hidden"] @ given["weight"].t()
        self.log_q = self.z.log_softmax(-1)
        self.q = self.log_q.exp()
        self.ids, self.target = given["input_ids"], given["target"]
        self.w = torch.where(self.target != -100, given["row_weight"], 0.0)
        if keep is not None:
            self.w = torch.where(keep, self.w, 0.0)
        self.f = torch.einsum("bt,btv->v", self.w, self.q) / self.w.sum()

    def mean(self, x: Tensor) -> Tensor:
        return (self.w * x).sum() / self.w.sum()


def ages(ids: Tensor, member: Tensor, starts: bool) -> list[list[int | None]]:
    out = []
    for row in ids.tolist():
        age: int | None = 0 if starts else None
        ages_of_row = []
        for token in row:
            age = 0 if member[token] else None if age is None else age + 1
            ages_of_row.append(age)
        out.append(ages_of_row)
    return out


def hazards(rows: Rows, member: Tensor, target: Tensor, starts: bool) -> Tensor:
    mass = rows.q[..., member].sum(-1)
    of = ages(rows.ids, member, starts)
    out = []
    for age in range(A):
        here = torch.tensor([[x == age for x in row] for row in of])
        w = torch.where(here, rows.w, 0.0)
        out.append((w * mass).sum() / w.sum() if w.sum() > 0 else target[age])
    return torch.stack(out)


def of_hazards(h: Tensor, target: Tensor, distance: str) -> Tensor:
    alive, model_alive, survival, gaps = 1.0, 1.0, [], []
    for age in range(A):
        survival.append(alive)
        alive, model_alive = alive * (1 - target[age]), model_alive * (1 - h[age])
        gaps.append((1 - model_alive) - (1 - alive))
    s, gap = torch.tensor([float(x) for x in survival], dtype=torch.float64), torch.stack(gaps)
    s = s / s.sum()
    if distance == "wasserstein":
        return gap.abs().sum()
    if distance == "cramer":
        return gap.square().sum()
    if distance == "squared":
        return (s * (h - target).square()).sum()
    return (s * (target * (target / h).log() + (1 - target) * ((1 - target) / (1 - h)).log())).sum()


def length_of(distance: str, starts: bool = False, member: Tensor = ENDS, target: Tensor = HAZARD) -> Callable:
    return lambda rows: of_hazards(hazards(rows, member, target, starts), target, distance)


def renewal(rows: Rows, starts: bool, distance: str) -> Tensor:
    counts = [torch.zeros((), dtype=torch.float64)] * (T + 2)
    for b in range(B):
        state: list[Any] = [0.0] * (T + 2)  # s(a)
        if ENDS[rows.ids[b, 0]]:
            state[0] = 1.0
        elif starts:
            state[1] = 1.0
        for t in range(T):
            e = rows.q[b, t, ENDS].sum()
            if rows.w[b, t] == 0:
                e = torch.tensor(float(t + 1 < T and bool(ENDS[rows.ids[b, t + 1]]))).double()
            counts = [c + rows.w[b, t] * e * s for c, s in zip(counts, state, strict=True)]
            state = [e, *((1 - e) * s for s in state[:-1])]
    p = torch.stack(counts) / torch.stack(counts).sum()
    gap = (p.cumsum(0)[:A]) - LENGTHS.cumsum(0)
    return gap.abs().sum() if distance == "wasserstein" else gap.square().sum()


def n_grams(rows: Rows, tracked: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    contexts = tracked["contexts"].reshape(len(tracked["completions"]), -1).tolist()
    for context, token, p in zip(contexts, tracked["completions"], tracked["probabilities"].double(), strict=True):
        n = len(context)
        here = torch.tensor(
            [[t + 1 >= n and row[t + 1 - n : t + 1] == context for t in range(T)] for row in rows.ids.tolist()]
        )
        w = torch.where(here, rows.w, 0.0)
        if w.sum() > 0:
            c = (w * rows.q[..., token]).sum() / w.sum()
            total = total + w.sum() / rows.w.sum() * (c - p).square() / p
    return total


def sinkhorn(rows: Rows, k: int, epsilon: float) -> Tensor:
    """Debiased, by unrolled iterations on the log domain, on the support and its bucket."""
    inside = torch.zeros(V, dtype=torch.bool)
    inside[rows.f.detach().topk(k).indices] = True
    inside[P.topk(k).indices] = True
    tail = (P[~inside] @ EMBEDDINGS[~inside])[None]
    x = torch.nn.functional.normalize(torch.cat([EMBEDDINGS[inside], tail]), dim=1)
    cost = (1 - x @ x.t()).clamp(min=0)
    cost.fill_diagonal_(0)
    a, b = (torch.cat([d[inside], d[~inside].sum()[None]]) for d in (rows.f, P))

    def ot(a: Tensor, b: Tensor) -> Tensor:
        f = g = torch.zeros_like(a)
        for _ in range(1500):
            f = -epsilon * ((g - cost) / epsilon + b.log()).logsumexp(1)
            g = -epsilon * ((f - cost.t()) / epsilon + a.log()).logsumexp(1)
        return (f * a).sum() + (g * b).sum()

    return ot(a, b) - ot(a, a) / 2 - ot(b, b) / 2


RFF = random_fourier_features(EMBEDDINGS, 16, seed=3)
TERMS: dict[str, tuple[DistributionTerm, Callable[[Rows], Tensor]]] = {
    "l2": (TokenL2(P), lambda rows: (rows.f - P).square().sum().sqrt()),
    "l2_squared": (TokenL2(P, squared=True), lambda rows: (rows.f - P).square().sum()),
    "chi_squared": (ChiSquared(P), lambda rows: ((rows.f - P) ** 2 / P).sum()),
    "kl_forward": (UnigramKL(P), lambda rows: (P * (P / rows.f).log()).sum()),
    "kl_reverse": (UnigramKL(P, "reverse"), lambda rows: (rows.f * (rows.f / P).log()).sum()),
    "mmd": (VocabularyMMD(P, EMBEDDINGS), lambda rows: ((rows.f - P) @ EMBEDDINGS).square().sum()),
    "mmd_fourier": (VocabularyMMD(P, RFF), lambda rows: ((rows.f - P) @ (RFF @ RFF.t()) @ (rows.f - P))),
    "rate": (PunctuationRate(MARKS, RATE), lambda rows: (((rows.f @ MARKS.double()) - RATE) ** 2 / RATE).sum()),
    "bigrams": (NGrams(**TRACKED, vocab_size=V), lambda rows: n_grams(rows, TRACKED)),
    "trigrams": (NGrams(**PAIRS, vocab_size=V), lambda rows: n_grams(rows, PAIRS)),
    "entropy": (Entropy(1.3), lambda rows: (rows.mean(-(rows.q * rows.log_q).sum(-1)) - 1.3) ** 2),
    "calibration": (
        Entropy(calibration=True),
        lambda rows: (
            rows.mean(-(rows.q * rows.log_q).sum(-1))
            + rows.mean(rows.log_q.gather(-1, rows.target.clamp(min=0)[..., None])[..., 0]).detach()
        ) ** 2,
    ),
    **{f"length_{d}": (SentenceLength(ENDS, HAZARD, distance=d), length_of(d)) for d in
       ("wasserstein", "cramer", "squared", "bernoulli_kl")},
    "length_starts": (SentenceLength(ENDS, HAZARD, starts=True), length_of("wasserstein", True)),
    "gaps": (
        PunctuationGap(MARKS, HAZARDS),
        lambda rows: sum(length_of("bernoulli_kl", False, m, h)(rows) for m, h in zip(MARKS.t(), HAZARDS, strict=True)) / 3,
    ),
    "renewal": (
        SentenceLength(ENDS, lengths=LENGTHS, kind="renewal"), lambda rows: renewal(rows, False, "wasserstein"),
    ),
    "renewal_starts": (
        SentenceLength(ENDS, lengths=LENGTHS, kind="renewal", starts=True, distance="cramer"),
        lambda rows: renewal(rows, True, "cramer"),
    ),
}  # fmt: skip


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    for one, other in zip(got, want, strict=True):
        scale = max(float(other.norm()), 1e-3)
        assert float((one - other).norm()) <= tolerance * scale, (one, other)


def gradients(loss: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (given["hidden"], given["weight"]))


def of_loss(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: given[name] for name in ("hidden", "weight", "target", "input_ids", "row_weight")} | more


def cross_entropy(given: dict[str, Any]) -> Tensor:
    rows = Rows(given)
    return rows.mean(-rows.log_q.gather(-1, rows.target.clamp(min=0)[..., None])[..., 0])
