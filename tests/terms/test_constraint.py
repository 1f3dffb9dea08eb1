"""Terms as constraints: dual ascent at running means, and the noise floors that bound them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dft_kernels.terms import AtMost, Delayed, Entropy, PunctuationRate, TextMMD, TokenL2, gains, noise_floor

V, H = 3, 2
P = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def lengths(texts: Any) -> Tensor:
    """phi of whole texts."""
    return torch.tensor([[float(len(text))] for text in texts])


def test_dual_ascent_ends_at_the_bound() -> None:
    """Where the constraint binds gradient descent meets it, and lambda is the multiplier; where not, lambda is 0."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 40, H, generator=draw, dtype=torch.float64)
    weight = torch.zeros(V, H, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 2, (1, 40), generator=draw)  # cross-entropy alone goes towards (0.5, 0.5, 0)
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    (gain,) = gains(TokenL2(P, squared=True), hidden, weight, target, bias=bias).values()
    constrained = Delayed(AtMost(TokenL2(P, squared=True), bound=0.01, gain=gain, most=10.0), decay=0.0)
    for _ in range(1000):
        out = constrained.loss(hidden, weight, target, bias=bias)
        gradient = torch.autograd.grad(out.loss, (weight, bias))
        with torch.no_grad():
            weight -= 0.2 * gradient[0]
            bias -= 0.2 * gradient[1]
        constrained.update()
    (term,) = constrained.bounded.values()
    assert term.ratio == pytest.approx(1.0, abs=0.02)
    assert 0.1 < term.dual < 10.0
    free = Delayed(AtMost(TokenL2(P, squared=True), bound=10.0, gain=gain, rate=0.02, start=0.3), decay=0.0)
    for _ in range(30):
        free.loss(hidden, weight, target, bias=bias)
        free.update()
    assert free.bounded["TokenL2"].dual == 0.0
    again = Delayed(AtMost(TokenL2(P, squared=True), bound=0.01, gain=gain, most=10.0), decay=0.0)
    again.load_state_dict(constrained.state_dict())
    assert again.bounded["TokenL2"].dual == term.dual
    lower = Delayed(AtMost(TokenL2(P, squared=True), bound=0.01, gain=gain, most=0.1), decay=0.0)
    lower.load_state_dict(constrained.state_dict())
    assert lower.bounded["TokenL2"].dual == 0.1


def test_constraints_at_noisy_means_do_not_wind_up() -> None:
    """Adam's steps on 64 rows, at a learning rate at which late means make a model swing: it stays about as near to the
    text as by cross-entropy alone. (With lambda in units of the loss and a rise by the whole gap, 14 times
    cross-entropy's pull after one step here, it ended 30 times as far, and farther with every step.)"""
    p = torch.arange(1, 41, dtype=torch.float64).reciprocal()
    p /= p.sum()
    draw = torch.Generator().manual_seed(0)
    text = torch.multinomial(p, 4000 * 8, replacement=True, generator=draw).reshape(4000, 8)
    marks = torch.zeros(40, 2)
    marks[3, 0] = marks[7, 1] = 1
    head = torch.zeros(40, 1, dtype=torch.float64)

    def ends_at(most: float) -> tuple[float, Delayed]:
        bias = torch.zeros(40, dtype=torch.float64, requires_grad=True)
        given = {"hidden": text.new_zeros(1, 2000, 1).double(), "target": text.reshape(1, -1)[:, :2000]}
        terms = [TokenL2(p, squared=True), PunctuationRate(marks, p @ marks.double())]
        bounds = [noise_floor(term, text, text, 64 * 19)[term.name] for term in terms]
        measured = [gains(term, weight=head, bias=bias, **given)[term.name] for term in terms]
        made = [AtMost(*of, most=most) for of in zip(terms, bounds, measured, strict=True)]
        delayed = Delayed(made[0] + made[1])
        optimizer = torch.optim.Adam([bias], lr=0.05)
        order, distances = torch.Generator().manual_seed(1), []
        for step in range(400):
            target = text.reshape(-1)[torch.randint(0, text.numel(), (1, 64), generator=order)]
            loss = delayed.loss(given["hidden"][:, :64], head, target, bias=bias).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            delayed.update()
            assert all(term.dual <= min(most, 0.01 * max(0, step - 8)) for term in delayed.bounded.values())
            distances.append(float((p * (p.log() - bias.detach().log_softmax(0))).sum()))
        return sum(distances[200:]) / 200, delayed

    alone, _ = ends_at(1e-9)
    found, delayed = ends_at(AtMost(TokenL2(P), 1.0, 1.0).most)
    assert found < 4 * alone
    assert all(term.ratio is not None and term.ratio < 10 for term in delayed.bounded.values())
    assert any(term.dual > 0 for term in delayed.bounded.values())


@pytest.mark.parametrize(("make", "said"), [
    (lambda: AtMost(2.0 * TokenL2(P), 0.1, 1.0), "be one DistributionTerm, without a weight, got a sum"),
    (lambda: AtMost(TokenL2(P), 0.0, 1.0), "bound must be a finite number above 0, got 0"),
    (lambda: AtMost(TokenL2(P), float("nan"), 1.0), "bound must be a finite number above 0, got nan"),
    (lambda: AtMost(TokenL2(P), 0.1, 0.0), "gain must be a finite number above 0, got 0"),
    (lambda: AtMost(TokenL2(P), 0.1, 1.0, most=float("inf")), "most must be a finite number above 0, got inf"),
    (lambda: AtMost(TokenL2(P), 0.1, 1.0, start=-1.0), "start must lie in 0..0.5, got -1.0. Leave it out"),
    (lambda: AtMost(TokenL2(P), 0.1, 1.0, start=0.6), "start must lie in 0..0.5, got 0.6"),
    (lambda: AtMost(AtMost(TokenL2(P), 0.1, 1.0), 0.1, 1.0), "got AtMost"),
])  # fmt: skip
def test_constraint_errors(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"AtMost: .*{said}"):
        make()


def test_noise_floor_is_what_samples_are_off_by() -> None:
    """Draws of P itself: E ||f - t||^2 = (1 - ||t||^2) / rows."""
    draw = torch.Generator().manual_seed(1)
    target = torch.multinomial(P, 4000 * 8, replacement=True, generator=draw).reshape(4000, 8)
    ids = torch.roll(target, 1, 1)
    terms = 3.0 * TokenL2(P, squared=True) + Entropy(value=1.0) + AtMost(TokenL2(P, squared=True), 0.5, 1.0)
    found = noise_floor(terms + TextMMD(lengths, ["ab"]), ids, target, rows=400, draws=400)
    assert list(found) == ["TokenL2_0", "Entropy", "TokenL2_2", "TextMMD"]
    assert found["TextMMD"] is None
    want = (1 - float(P.square().sum())) / 400
    assert found["TokenL2_0"] == pytest.approx(3 * want, rel=0.2)
    assert found["TokenL2_2"] == pytest.approx(want, rel=0.2)
    assert found["Entropy"] is None
    rates = noise_floor(PunctuationRate(torch.eye(V), P), ids, target, rows=400, draws=400)["PunctuationRate"]
    assert rates == pytest.approx((V - 1) / 400, rel=0.2)  # chi-squared of V - 1 degrees of freedom
    with pytest.raises(ValueError, match="hold as many labels as rows, got 32000 of them for rows=40000"):
        noise_floor(TokenL2(P), ids, target, rows=40000)
