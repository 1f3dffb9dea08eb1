"""`Delayed`: running statistics, accumulation, state, and that it costs no product; `exact` costs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from term_cases import ENDS, HAZARD, TERMS, B, P, V, close, cross_entropy, gradients, made, of_loss

from dft_kernels import linear_distribution_loss
from dft_kernels.backends import gemm
from dft_kernels.terms import Delayed, Entropy, SentenceLength, TokenL2, exact


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
