"""Distribution terms: every value and gradient against the same formula on full logits, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dft_kernels import TeacherLogits, linear_distribution_loss
from dft_kernels import terms as terms_room
from dft_kernels.backends import gemm
from dft_kernels.terms import (
    AtMost,
    ChiSquared,
    Delayed,
    DistributionTerm,
    EmbeddingTransport,
    Entropy,
    NGrams,
    PunctuationGap,
    PunctuationRate,
    SentenceLength,
    TokenL2,
    UnigramKL,
    VocabularyMMD,
    exact,
    gains,
    random_fourier_features,
    transport,
)

B, T, H, V, A = 4, 23, 8, 31, 5
FORM = re.compile(r"^[\w.]+: .+ must .+, got .+\. .+\.$", re.S)


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


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient(name: str) -> None:
    """0.7 J beside the cross-entropy: exact, and delayed where its running statistics are this batch's."""
    term, formula = TERMS[name]
    given = made()
    want = cross_entropy(given) + 0.7 * formula(Rows(given))
    truth = (want.detach(), *gradients(want, given))
    found = exact(**of_loss(given), term=0.7 * term, chunk_size=17)
    close((found.loss.detach(), *gradients(found.loss, given)), truth)
    close([found.fused + sum(found.terms.values())], [found.loss.detach()])
    if term.linear:
        delayed = Delayed(0.7 * term)
        delayed.observe(**of_loss(given))
        delayed.update()
        seen = delayed.loss(**of_loss(given), chunk_size=17)
        close((seen.loss.detach(), *gradients(seen.loss, given)), truth)
        before = delayed.running
        delayed.update()  # the loss's own pass saw the same statistics
        close([delayed.running], [1.9 * before])
    else:
        with pytest.raises(ValueError, match="linear in the model's probabilities, got SentenceLength"):
            Delayed(term)


@pytest.mark.parametrize("name", TERMS)
def test_gain(name: str) -> None:
    """V / (2 J), where V = sum_n <dJ/dz_n, P_n>, and P_n = (W / w_n) dJ/dz_n / q_n but for a constant."""
    term, formula = TERMS[name]
    given = made()
    rows = Rows(given)
    value = formula(rows)
    (slope,) = torch.autograd.grad(value, rows.z)
    per_row = (slope.square() / rows.q.detach()).sum(-1) / torch.where(rows.w == 0, 1.0, rows.w)
    want = float(rows.w.sum() * per_row.sum() / (2 * value.detach()))
    both = gains(**of_loss(given), term=3.0 * AtMost(term, 0.1) + TokenL2(P), chunk_size=17)
    assert next(iter(both.values())) == pytest.approx(want, rel=1e-9)
    assert len(both) == 2


def test_gain_of_a_capped_and_adapted_head() -> None:
    given = made()
    z = 1.3 * (given["hidden"] @ given["weight"].t() + (draws(11, B, T, 2) @ draws(12, V, 2).t()) + draws(13, V))
    wide = 4.0 * torch.tanh(z / 4.0)  # the same rows from a head that is the identity
    plain = {**given, "hidden": wide.detach(), "weight": torch.eye(V, dtype=torch.float64)}
    terms = sum(term for term, _ in TERMS.values())
    (want,) = (gains(**of_loss(plain), term=terms),)
    head = {"logit_scale": 1.3, "softcap": 4.0, "bias": draws(13, V), "low_rank": (draws(11, B, T, 2), draws(12, V, 2))}
    found = gains(**of_loss(given), term=terms, **head)
    assert len(found) == len(TERMS)
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-9)


def test_gain_in_bfloat16() -> None:
    given = made()
    terms = TokenL2(P, squared=True) + SentenceLength(ENDS, HAZARD, distance="cramer") + PunctuationRate(MARKS, RATE)
    want = gains(**of_loss(given), term=terms)
    narrow = {name: given[name].detach().bfloat16() for name in ("hidden", "weight")}
    found = gains(**of_loss({**given, **narrow}), term=terms)
    assert found == {name: pytest.approx(value, rel=0.03) for name, value in want.items()}


@pytest.mark.parametrize("times", [0.25, 1.0, 3.0])
def test_a_weight_of_x_over_gain_goes_x_of_1_plus_x_of_the_way(times: float) -> None:
    """Where the way is short: two tokens, one row, KL from where it was in place of cross-entropy."""
    old = torch.tensor([0.3, 0.7], dtype=torch.float64)
    term = TokenL2(torch.tensor([0.3005, 0.6995], dtype=torch.float64), squared=True)
    head = torch.eye(2, dtype=torch.float64)
    weight = times / gains(term, old.log()[None], head)["TokenL2"]
    z = old.log()[None].clone().requires_grad_()
    for _ in range(300):
        loss = exact(
            z, head, None, weight * term, soft_weight=1.0, hard_weight=0.0, teacher=TeacherLogits(old.log()[None])
        ).loss
        z = (z - 0.5 * torch.autograd.grad(loss, z)[0]).detach().requires_grad_()
    gone = (z.detach().softmax(-1)[0, 0] - 0.3) / 0.0005
    assert float(gone) == pytest.approx(times / (1 + times), rel=1e-3)


def test_a_term_that_does_not_pull_has_no_gain() -> None:
    given = made()
    empty = {**of_loss(given), "row_weight": torch.zeros(B, T, dtype=torch.float64)}
    assert gains(**empty, term=TokenL2(P)) == {"TokenL2": 0.0}
    with pytest.raises(TypeError, match="gains: input_ids must be"):
        gains(**{**of_loss(given), "input_ids": None}, term=TERMS["rate"][0] + SentenceLength(ENDS, HAZARD))


def test_a_float32_batch_and_every_backend() -> None:
    given = made()
    terms = sum(0.3 * term for term, _ in TERMS.values() if term.linear)
    want = gradients(exact(**of_loss(given), term=terms).loss, given)
    narrow = {**given, **{n: given[n].detach().float().requires_grad_() for n in ("hidden", "weight")}}
    for backend in ("reference", "auto"):
        for cross_fit in (False, True):
            loss = exact(**of_loss(narrow), term=terms, backend=backend, cross_fit=cross_fit).loss
            assert loss.dtype == torch.float32
            got = gradients(loss, narrow)
            if not cross_fit:
                close(got, want, 1e-4)


@pytest.mark.parametrize("exactly", [True, False])
def test_embedding_transport(exactly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ot")
    monkeypatch.setattr(transport, "_CLOSE", 1e-13)  # to see the formula, not where iterations end
    given, k = made(), 6
    given["weight"] = (given["weight"].detach() * 3).requires_grad_()
    term = EmbeddingTransport(P, EMBEDDINGS, k, None if exactly else 0.5)

    def run() -> Any:
        return exact(**of_loss(given), term=term, hard_weight=0.0)

    found = run().loss
    got = gradients(found, given)
    if not exactly:
        want = sinkhorn(Rows(given), k, 0.5)
        close((found.detach(), *got), (want.detach(), *gradients(want, given)))
        return
    direction = torch.randn(V, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step, plain = 1e-6, given["weight"]
    ends = []
    for sign in (1, -1):
        given["weight"] = (plain.detach() + sign * step * direction).requires_grad_()
        ends.append(float(run().loss.detach()))
    assert abs((ends[0] - ends[1]) / (2 * step) - float((got[1] * direction).sum())) < 1e-6


def test_transport_knows_its_target() -> None:
    pytest.importorskip("ot")
    for regularisation in (None, 0.05):
        term = EmbeddingTransport(P, EMBEDDINGS, 8, regularisation)
        f = P.clone().requires_grad_()
        value = term.value(f, P)
        assert abs(float(value.detach())) < 1e-9
        if regularisation:
            g = torch.autograd.grad(value, f)[0]
            assert float((g - g.mean()).abs().max()) < 1e-6


def test_a_model_at_its_target_is_left_alone() -> None:
    """Targets made of the model's own statistics: J is 0 and so is its gradient."""
    given = made()
    rows = Rows({name: x.detach() for name, x in given.items()})
    f = rows.f
    h = hazards(rows, ENDS, HAZARD, False)
    marks = torch.stack([hazards(rows, m, t, False) for m, t in zip(MARKS.t(), HAZARDS, strict=True)])
    c = []
    for context, token in zip(TRACKED["contexts"], TRACKED["completions"], strict=True):
        w = torch.where(rows.ids == context, rows.w, 0.0)
        c.append((w * rows.q[..., token]).sum() / w.sum())
    at_target = {
        "l2": TokenL2(f), "l2_squared": TokenL2(f, True), "chi": ChiSquared(f), "kl": UnigramKL(f),
        "reverse": UnigramKL(f, "reverse"), "mmd": VocabularyMMD(f, EMBEDDINGS),
        "rate": PunctuationRate(MARKS, f @ MARKS.double()),
        "bigrams": NGrams(TRACKED["contexts"], TRACKED["completions"], torch.stack(c), V),
        "entropy": Entropy(float(rows.mean(-(rows.q * rows.log_q).sum(-1)))),
        **{d: SentenceLength(ENDS, h, distance=d) for d in ("cramer", "squared", "bernoulli_kl")},
        "gaps": PunctuationGap(MARKS, marks),
    }  # fmt: skip
    for name, term in at_target.items():
        found = exact(**of_loss(given), term=term, hard_weight=0.0)
        assert float(found.loss.detach()) < (1e-7 if name == "l2" else 1e-12), name
        if name != "l2":  # whose gradient has norm 1 however near
            assert max(float(g.norm()) for g in gradients(found.loss, given)) < 1e-7, name


def test_composition_is_linear() -> None:
    given = made()
    one, two = TERMS["chi_squared"][0], TERMS["length_cramer"][0]
    both = 0.5 * (0.2 * one + two) + sum([0.3 * two, one * 2])
    assert [(round(by, 12), type(term).__name__) for by, term in both.parts] == [
        (0.1, "ChiSquared"), (0.5, "SentenceLength"), (0.3, "SentenceLength"), (2.0, "ChiSquared"),
    ]  # fmt: skip
    alone = [exact(**of_loss(given), term=term, hard_weight=0.0).loss for term in (one, two)]
    joint = exact(**of_loss(given), term=both, hard_weight=0.0)
    close([joint.loss.detach()], [2.1 * alone[0].detach() + 0.8 * alone[1].detach()])
    parts = [gradients(loss, given) for loss in alone]
    close(gradients(joint.loss, given), [2.1 * a + 0.8 * b for a, b in zip(*parts, strict=True)])
    assert set(joint.terms) == {"ChiSquared_0", "SentenceLength_1", "SentenceLength_2", "ChiSquared_3"}


def test_lengths_and_hazards_are_one_target() -> None:
    alive = torch.cat([torch.ones(1).double(), (1 - HAZARD).cumprod(0)[:-1]])
    given = made()
    for distance in ("wasserstein", "bernoulli_kl"):
        of = [
            SentenceLength(ENDS, HAZARD, distance=distance),
            SentenceLength(ENDS, lengths=HAZARD * alive, distance=distance),
        ]
        a, b = (exact(**of_loss(given), term=term).loss.detach() for term in of)
        close([a], [b])


def test_cross_fitting_removes_the_bias() -> None:
    """‖f_hat - t‖² of a batch overestimates that of the mean over batches by Var(f_hat); half against half does not,
    and neither does its gradient lean towards its own rows."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=draw, dtype=torch.float64) * 2
    batches = [torch.randn(2, 3, H, generator=draw, dtype=torch.float64) for _ in range(250)]
    f = [(hidden @ weight.t()).softmax(-1).mean((0, 1)) for hidden in batches]
    true = torch.stack(f).mean(0)
    variance = (torch.stack(f) - true).square().sum(1).mean()
    plain, fitted, by_plain, by_fitted = [], [], [], []
    for hidden in batches:
        for cross_fit, into, by in ((False, plain, by_plain), (True, fitted, by_fitted)):
            scaled = torch.ones((), dtype=torch.float64).requires_grad_()  # dJ / d(scale of the logits)
            found = exact(hidden * scaled, weight, None, TokenL2(true, squared=True), cross_fit=cross_fit)
            into.append(found.loss.detach())
            by.append(torch.autograd.grad(found.loss, scaled)[0])
    values, errors = {}, {}
    for name, of in (("plain", plain), ("fitted", fitted), ("by_plain", by_plain), ("by_fitted", by_fitted)):
        values[name] = float(torch.stack(of).mean())
        errors[name] = float(torch.stack(of).std()) / len(of) ** 0.5
    assert abs(values["plain"] - float(variance)) < 1e-9  # what is there is bias alone
    assert abs(values["fitted"]) < 4 * errors["fitted"]
    assert float(variance) > 10 * errors["fitted"]
    assert values["by_plain"] > 10 * errors["by_plain"]  # J(f) is at its minimum, and the plain gradient is not 0
    assert abs(values["by_fitted"]) < 4 * errors["by_fitted"]


def test_the_cross_fitted_gradient_is_of_its_value_where_j_is_quadratic() -> None:
    given = made()
    given["row_weight"] = torch.ones(B, T, dtype=torch.float64)
    given["target"] = torch.zeros(B, T, dtype=torch.int64)
    term = 0.7 * TokenL2(P, squared=True) + PunctuationRate(MARKS, RATE)
    found = exact(**of_loss(given), term=term, cross_fit=True, hard_weight=0.0)
    half = torch.arange(B)[:, None].remainder(2).expand(B, T)
    a, b = Rows(given, half == 0).f, Rows(given, half == 1).f
    r = [x @ MARKS.double() - RATE for x in (a, b)]
    want = 0.7 * ((a - P) * (b - P)).sum() + (r[0] * r[1] / RATE).sum()
    close((found.loss.detach(), *gradients(found.loss, given)), (want.detach(), *gradients(want, given)))


def test_accumulation_is_one_batch() -> None:
    """Two micro-batches of a step against one: the running state and the gradient; before the first update, none."""
    given = made()
    terms = sum(0.3 * term for term, _ in TERMS.values() if term.linear)
    one, two = Delayed(terms, decay=0.5), Delayed(terms, decay=0.5)
    items = float(torch.where(given["target"] != -100, given["row_weight"], 0.0).sum())
    for step in range(3):
        whole = one.loss(**of_loss(given), num_items=items)
        parts = [
            two.loss(**{n: x if n == "weight" else x[rows] for n, x in of_loss(given).items()}, num_items=items)
            for rows in (slice(0, 1), slice(1, B))
        ]
        split = gradients(parts[0].loss + parts[1].loss, given)
        close(split, gradients(whole.loss, given))
        close([parts[0].loss.detach() + parts[1].loss.detach()], [whole.loss.detach()])
        if step == 0:
            close(split, gradients(cross_entropy(given), given))
            assert one.values() == {}
        one.update()
        two.update()
        close([two.running], [one.running])
    assert set(one.values()) == set(one.terms.names)


def test_terms_alone_and_one_sequence() -> None:
    given = made()
    one = {"hidden": given["hidden"][0], "weight": given["weight"], "input_ids": given["input_ids"][0]}
    delayed = Delayed(SentenceLength(ENDS, HAZARD) + Entropy(1.0) + TokenL2(P))
    assert float(delayed.loss(**one).loss.detach()) == 0
    delayed.update()
    a = exact(**one, target=None, term=delayed.terms)
    b = delayed.loss(**one)
    close([b.loss.detach(), *gradients(b.loss, given)], [a.loss.detach(), *gradients(a.loss, given)])


def test_a_loop_of_its_own() -> None:
    """`arguments` before the loss and `collect` after it are what `loss` does."""
    given = made()
    terms = TERMS["chi_squared"][0] + TERMS["bigrams"][0] + TERMS["calibration"][0]
    one, two = Delayed(terms), Delayed(terms)
    call = of_loss(given)
    ids = call.pop("input_ids")
    for _ in range(2):
        whole = one.loss(**call, input_ids=ids)
        loss, metrics = linear_distribution_loss(**call, **two.arguments(**call, input_ids=ids))
        two.collect(metrics, call["target"], input_ids=ids, row_weight=call["row_weight"])
        close(gradients(loss, given), gradients(whole.loss, given))
        one.update()
        two.update()
        close([one.running], [two.running])


def test_what_is_left_out_of_the_running_means() -> None:
    """Evaluation, and a step that is not finite."""
    given, delayed = made(), Delayed(TERMS["l2"][0] + TERMS["rate"][0])
    delayed.loss(**of_loss(given))
    delayed.update()
    before = delayed.running.clone()
    with torch.no_grad():
        delayed.loss(**of_loss(given))
    assert delayed.pending is None
    delayed.loss(**of_loss(given | {"hidden": given["hidden"] * torch.nan}))
    delayed.update()
    close([delayed.running], [0.9 * before])


def test_state_goes_on() -> None:
    given = made()
    terms = TERMS["l2"][0] + TERMS["rate"][0]
    one, two = Delayed(terms), Delayed(terms)
    for _ in range(2):
        one.loss(**of_loss(given))
        one.update()
    two.load_state_dict(one.state_dict())
    assert two.steps == 2
    close(gradients(two.loss(**of_loss(given)).loss, given), gradients(one.loss(**of_loss(given)).loss, given))
    other = TokenL2(torch.full((V + 1,), 1 / (V + 1)))
    for wrong in (TERMS["l2"][0], other + TERMS["entropy"][0], TERMS["rate"][0] + TERMS["l2"][0]):
        with pytest.raises(ValueError, match=r"state must be of the terms \[.*got \['TokenL2\[31\]', 'Pun"):
            Delayed(wrong).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="state must be what state_dict returned, got \\['a'\\]"):
        two.load_state_dict({"a": 1})
    with pytest.raises(ValueError, match="a batch must have been seen, got none"):
        Delayed(terms).update()


HID, W_ = torch.randn(2, 3, H), torch.randn(V, H)
L2, LENGTH = TokenL2(P), SentenceLength(ENDS, HAZARD)
ERRORS = {
    "target_type": (lambda: TokenL2([1.0]), TypeError, r"TokenL2: target must be a tensor, got list"),
    "target_sum": (lambda: TokenL2(P * 2), ValueError, "target must be probabilities that sum to 1, got a sum of 2"),
    "target_zero": (lambda: ChiSquared(torch.eye(3)[0]), ValueError, "target must be above 0 everywhere, got 2 zeros"),
    "direction": (lambda: UnigramKL(P, "up"), ValueError, "direction must be forward or reverse, got 'up'"),
    "mmd": (lambda: VocabularyMMD(P, EMBEDDINGS[:5]), ValueError, r"features must be floating \[31, r\], got \[5, 6\]"),
    "fourier": (lambda: random_fourier_features(EMBEDDINGS, 0), ValueError, "r must be an int of at least 1, got 0"),
    "bandwidth": (lambda: random_fourier_features(EMBEDDINGS, 4, -1.0), ValueError, "bandwidth must be greater than 0"),
    "nan": (lambda: TokenL2(P / 0 * 0), ValueError, "target must be finite"),
    "ends": (lambda: SentenceLength(torch.zeros(V), HAZARD), ValueError, "sentence_end must hold a token in every class"),
    "ends_2d": (lambda: SentenceLength(MARKS, HAZARD), ValueError, r"sentence_end must have shape \[V\], got \[31, 3\]"),
    "both": (lambda: SentenceLength(ENDS, HAZARD, LENGTHS), ValueError, "hazard or lengths must be given, one of them, got both"),
    "lengths": (lambda: SentenceLength(ENDS, lengths=LENGTHS * 2), ValueError, "lengths must be at least 0 and sum to at most 1"),
    "hazard": (lambda: SentenceLength(ENDS, HAZARD * 9), ValueError, "hazard must lie in 0..1"),
    "kind": (lambda: SentenceLength(ENDS, HAZARD, kind="x"), ValueError, "kind must be hazard or renewal, got 'x'"),
    "renewal": (
        lambda: SentenceLength(ENDS, HAZARD, kind="renewal", distance="squared"),
        ValueError, "distance must be one of wasserstein, cramer with kind='renewal', got 'squared'",
    ),
    "classes": (lambda: PunctuationGap(MARKS, HAZARD), ValueError, r"hazard must have a row for each of 3 classes, got \[1, 5\]"),
    "rate": (lambda: PunctuationRate(MARKS, RATE * 0), ValueError, "rate must be 3 numbers above 0 and at most 1"),
    "ngram_length": (
        lambda: NGrams(torch.ones(2, 4).long(), torch.ones(2).long(), torch.ones(2), V),
        ValueError, "contexts must have 1 to 3 tokens, got 4",
    ),
    "ngram_ids": (
        lambda: NGrams(torch.tensor([V]), torch.tensor([1]), torch.ones(1), V),
        ValueError, r"contexts must hold token ids in 0\.\.30, got torch.int64 in 31\.\.31",
    ),
    "ngram_zero": (
        lambda: NGrams(torch.tensor([1]), torch.tensor([1]), torch.zeros(1), V),
        ValueError, "probabilities must be above 0 and at most 1",
    ),
    "entropy": (lambda: Entropy(), ValueError, r"value or calibration=True must be given, one of them"),
    "entropy_value": (lambda: Entropy(-1.0), ValueError, "value must be a number of nats of at least 0, got -1.0"),
    "weight": (lambda: "a" * L2, TypeError, "a weight must be a number, got 'a'"),
    "sum": (lambda: L2 + 3, TypeError, "what is added to it must be a term, got int"),
    "vocabularies": (lambda: L2 + TokenL2(torch.ones(1)), ValueError, r"terms must be of one vocabulary, got \[1, 31\]"),
    "term": (lambda: exact(HID, W_, None, "l2"), TypeError, "term must be a DistributionTerm or a sum of them, got str"),
    "vocabulary": (lambda: exact(HID, W_[:5], None, L2), ValueError, "term must be of the head's vocabulary of 5, got 31"),
    "hidden": (lambda: exact(HID[0, 0], W_, None, L2), ValueError, r"hidden must be a tensor \[B, T, H\] or \[T, H\], got \[8\]"),
    "text": (lambda: exact(HID, W_, None, LENGTH), TypeError, "input_ids must be a tensor of int64 where a term asks"),
    "text_shape": (
        lambda: exact(HID, W_, None, LENGTH, input_ids=torch.zeros(2, 4).long()),
        ValueError, r"input_ids must be \[2, 3\] on cpu, got \[2, 4\] on cpu",
    ),
    "labels": (lambda: exact(HID, W_, torch.zeros(2, 4).long(), L2), ValueError, r"target must be a tensor \[2, 3\] on cpu"),
    "halves": (lambda: exact(HID[:1], W_, None, L2, cross_fit=True), ValueError, "cross_fit=True must come with two sequences"),
    "ours": (lambda: exact(HID, W_, None, L2, potential=P), TypeError, "potential must be left out, got one"),
    "reduction": (lambda: Delayed(L2).loss(HID, W_, reduction="sum"), ValueError, "reduction must be mean, got 'sum'"),
    "calibration": (lambda: exact(HID, W_, None, Entropy(calibration=True)), ValueError, "target must be given where entropy"),
    "decay": (lambda: Delayed(L2, decay=1.0), ValueError, "decay must lie in 0..1, below 1, got 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, text = ERRORS[name]
    with pytest.raises(error, match=text) as caught:
        call()
    assert FORM.match(str(caught.value)), str(caught.value)


def test_transport_errors() -> None:
    pytest.importorskip("ot")
    with pytest.raises(ValueError, match=r"embeddings must be floating \[31, d\], got \[5, 6\]"):
        EmbeddingTransport(P, EMBEDDINGS[:5])
    with pytest.raises(ValueError, match=r"regularisation must be at least 0\.01 or None, got 0\.0"):
        EmbeddingTransport(P, EMBEDDINGS, regularisation=0.0)
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        EmbeddingTransport(P, EMBEDDINGS, 0)


def test_random_fourier_features_are_a_kernel() -> None:
    phi = random_fourier_features(EMBEDDINGS, 20000, bandwidth=0.8, seed=1)
    want = (-torch.cdist(EMBEDDINGS, EMBEDDINGS).square() / (2 * 0.8**2)).exp()
    assert float((phi @ phi.t() - want).abs().max()) < 0.05
    assert torch.equal(random_fourier_features(EMBEDDINGS, 8), random_fourier_features(EMBEDDINGS, 8))


def test_delayed_costs_no_product_and_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given, counts = made(), dict.fromkeys(("logits_", "dhidden_", "dweight_"), 0)
    for name in counts:
        plain = getattr(gemm, name)

        def counted(*arguments: Any, name: str = name, plain: Any = plain, **more: Any) -> Any:
            counts[name] += 1
            return plain(*arguments, **more)

        monkeypatch.setattr(gemm, name, counted)

    def products(run: Callable[[], Any]) -> list[int]:
        counts.update(dict.fromkeys(counts, 0))
        run().backward()
        return list(counts.values())

    call = of_loss(given, backend="reference")
    ids = call.pop("input_ids")
    terms = sum(term for term, _ in TERMS.values() if term.linear)
    delayed = Delayed(terms)
    for _ in range(2):
        assert products(lambda: delayed.loss(**call, input_ids=ids).loss) == [1, 1, 1]
        delayed.update()
    assert products(lambda: exact(**call, input_ids=ids, term=terms).loss) == [2, 1, 1]
    assert products(lambda: linear_distribution_loss(**call)) == [1, 1, 1]


def test_every_term_says_what_it_is() -> None:
    for name in terms_room.__all__:
        assert getattr(terms_room, name).__doc__
