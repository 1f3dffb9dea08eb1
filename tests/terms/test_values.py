"""Distribution terms: every value and gradient against the same formula on full logits, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from term_cases import (
    EMBEDDINGS,
    ENDS,
    HAZARD,
    HAZARDS,
    MARKS,
    RATE,
    TERMS,
    TRACKED,
    B,
    H,
    P,
    Rows,
    T,
    V,
    close,
    cross_entropy,
    gradients,
    hazards,
    made,
    of_loss,
    sinkhorn,
)

from dft_kernels import terms as terms_package
from dft_kernels.terms import (
    ChiSquared,
    Delayed,
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
    random_fourier_features,
    transport,
)


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


def test_random_fourier_features_are_a_kernel() -> None:
    phi = random_fourier_features(EMBEDDINGS, 20000, bandwidth=0.8, seed=1)
    want = (-torch.cdist(EMBEDDINGS, EMBEDDINGS).square() / (2 * 0.8**2)).exp()
    assert float((phi @ phi.t() - want).abs().max()) < 0.05
    assert torch.equal(random_fourier_features(EMBEDDINGS, 8), random_fourier_features(EMBEDDINGS, 8))


def test_every_term_says_what_it_is() -> None:
    for name in terms_package.__all__:
        assert getattr(terms_package, name).__doc__
