"""How much a term pulls beside the cross-entropy: `gains` against its formula on full logits."""

from __future__ import annotations

import pytest
import torch
from term_cases import ENDS, HAZARD, MARKS, RATE, TERMS, B, P, Rows, T, V, draws, made, of_loss

from dft_kernels import TeacherLogits
from dft_kernels.terms import AtMost, PunctuationRate, SentenceLength, TokenL2, exact, gains


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
    both = gains(**of_loss(given), term=3.0 * AtMost(term, 0.1, 1.0) + TokenL2(P), chunk_size=17)
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
