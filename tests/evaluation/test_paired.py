"""Which of two ways of writing lies closer to people: what is planted is found, and what is chance is not."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from target_texts import documents

from dft_kernels.evaluation.documents import Documents
from dft_kernels.evaluation.measure import Found, measured
from dft_kernels.evaluation.metrics import METRICS, Sample
from dft_kernels.evaluation.paired import Paired, paired
from dft_kernels.evaluation.results import DIFFERENCE, Value

COUNT = 40
NAMED = ("token L2, 1-grams", "sentence length, W1", "punctuation rates, L1", "distinct-2", "burstiness")
METRIC = {one.name: replace(one, halves=40) for one in METRICS}


def found(tokenizer: Any, sides: Sequence[list[str]], seed: int) -> list[list[Found]]:
    people = documents(2 * COUNT, seed)
    pool = Documents([*people, *(text for side in sides for text in side)], np.arange(2 * COUNT), tokenizer)
    rows = [np.arange((2 + at) * COUNT, (3 + at) * COUNT) for at in range(len(sides))]
    samples = {str(at): Sample(pool, one) for at, one in enumerate(rows)}
    return list(measured(samples, metrics=[METRIC[name] for name in NAMED]).values())


def without_commas(texts: list[str], share: float, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(one for one in text if one != "," or generator.random() > share) for text in texts]


def test_what_is_planted_in_one_side_is_found_there_alone(tokenizer: Any) -> None:
    """Commas, of which the first lacks most."""
    texts = [documents(COUNT, seed) for seed in (101, 102, 103, 104)]
    first = [without_commas(some, 0.9) for some in texts[:2]]
    made = found(tokenizer, [*first, *texts[2:]], 0)
    by_name = {one.metric: one for one in paired(made[:2], made[2:])}
    assert [*by_name] == list(NAMED)
    assert {name for name, one in by_name.items() if one.closer} == {"punctuation rates, L1", "token L2, 1-grams"}
    assert by_name["punctuation rates, L1"].halved
    back = {one.metric: one for one in paired(made[2:], made[:2])}
    assert not any(one.closer for one in back.values())
    for name, one in by_name.items():
        assert back[name].difference == pytest.approx(-one.difference)
        assert (back[name].error, back[name].p) == pytest.approx((one.error, one.p))


def test_people_are_no_closer_than_people(tokenizer: Any) -> None:
    """Of 40 pairs of sides that are alike, the family's 5 % is met by two; by six it is in one of a hundred runs."""
    wrong = 0
    for seed in range(40):
        made = found(tokenizer, [documents(COUNT, 1000 + 2 * seed), documents(COUNT, 1001 + 2 * seed)], seed)
        wrong += any(one.adjusted < 0.05 for one in paired(made[:1], made[1:]))
    assert wrong < 6


def one(value: float, spread: Sequence[float], name: str = "burstiness") -> Found:
    metric = METRIC[name]
    known = Value(name, value, value, value, 0.5, None, None, None, COUNT, "")
    return Found(metric, known, np.array(spread), np.zeros(0))


def test_the_formulas_by_hand() -> None:
    """Sizes of differences; the spread of both; a side of one seed has the other's variance."""
    first = [[one(-2.0, [-2.1, -1.9, -2.0])], [one(3.0, [3.2, 2.8, 3.0])]]
    (found,) = paired(first, [[one(-1.0, [-1.0, -1.1, -0.9])]])
    assert METRIC[found.metric].kind == DIFFERENCE
    assert (found.first, found.other, found.difference, found.floor) == (2.5, 1.0, -1.5, 0.5)
    halves = [1.0 - 2.65, 1.1 - 2.35, 0.9 - 2.5]
    assert found.error == pytest.approx((statistics.variance(halves) + 0.5 / 2 + 0.5 / 1) ** 0.5)
    assert found.p == pytest.approx(2 * statistics.NormalDist().cdf(-1.5 / found.error))
    assert found.adjusted == found.p
    assert found.halved
    assert not replace(found, other=1.26).halved


def test_holm_by_hand() -> None:
    """0.01 * 3, 0.03 * 2, and no less for the last."""
    errors = [1 / statistics.NormalDist().inv_cdf(1 - p / 2) for p in (0.03, 0.01, 0.04)]
    names = ("burstiness", "MTLD", "MATTR")
    sides = [[one(2.0, [2.0, 2.0], name) for name in names], []]
    for name, error in zip(names, errors, strict=True):
        sides[1].append(one(1.0, [1.0 - error / 2**0.5, 1.0 + error / 2**0.5], name))
    found = paired(sides[:1], sides[1:])
    assert [one.p for one in found] == pytest.approx([0.03, 0.01, 0.04])
    assert [one.adjusted for one in found] == pytest.approx([0.06, 0.03, 0.06])
    assert [one.closer for one in found] == [False, True, False]


def test_equal_sides_and_missing_values() -> None:
    same = [[one(1.0, [1.0, 1.0]), one(1.0, [1.0, 1.0], "MTLD")]]
    assert [(found.p, found.closer) for found in paired(same, same)] == [(1.0, False)] * 2
    none = Found(METRIC["MTLD"], replace(same[0][1].value, value=None, note="too few"), np.zeros(0), np.zeros(0))
    assert [found.metric for found in paired(same, [[same[0][0], none]])] == ["burstiness"]
    with pytest.raises(ValueError, match=r"^paired: first and other must be of one seed or more each, and of the same"):
        paired(same, [])
    with pytest.raises(ValueError, match="of the same metrics, got 1 and 1 of 2 lists of metrics"):
        paired(same, [[one(1.0, [1.0], "MATTR"), same[0][1]]])
    assert isinstance(paired(same, same)[0], Paired)
