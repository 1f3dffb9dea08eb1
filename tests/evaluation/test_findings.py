"""Is there a gap, was it closed, what did it cost: the words that a report computes from the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from evaluations import NAMES, evaluation

from dft_kernels.evaluation import figures, findings, wording
from dft_kernels.evaluation.results import DIFFERENCE, DISTANCE, LEVEL, About, Evaluation, Value
from dft_kernels.generation.sampling import Sampling


def made(*models: dict[str, tuple[float, float, float]], kind: str = DIFFERENCE, **of: Any) -> Evaluation:
    """Models by metric: value and interval, over a floor of 1."""
    run = evaluation(len(models))
    abouts = [About(name, "group", kind, "unit", "formula", "source") for name in models[0]]
    found = [
        replace(
            old,
            values=[Value(name, *three, 1.0, None, None, None, 50, "") for name, three in values.items()],
            **{"retention": [], "score": None, "cost": {}, **of},
        )
        for old, values in zip(run.models, models, strict=True)
    ]
    return replace(run, metrics=abouts, models=found)


def words(said: wording.Said) -> str:
    return "".join(one if isinstance(one, str) else one.text for one in said)


def answers(run: Evaluation, asked: str) -> list[str]:
    return [words(one.said) for one in findings.question(run, wording.labels(run.models))[asked]]


@pytest.mark.parametrize(
    ("three", "gap"),
    [
        ((2.0, 1.0, 3.0), True), ((-2.0, -3.0, -1.0), True), ((0.9, 0.5, 1.3), False), ((1.0, 0.5, 1.5), False),
        ((2.0, -0.1, 4.0), False), ((2.0, 0.0, 4.0), False), ((-2.0, -4.0, 0.0), False),
    ],
)  # fmt: skip
def test_a_gap_is_beyond_the_floor_and_sure(three: tuple[float, float, float], gap: bool) -> None:
    value = Value("m", *three, 1.0, None, None, None, 9, "")
    assert findings.has_gap(value) is gap
    for name in ("value", "low", "high", "floor"):
        assert findings.has_gap(replace(value, **{name: None})) is None


FAR, NEAR, NONE, WIDE = (9.0, 8.0, 10.0), (3.0, 2.0, 4.0), (0.5, 0.1, 0.9), (0.9, 0.1, 8.5)


def test_closed_left_and_opened() -> None:
    run = made(
        {"a": FAR, "b": FAR, "c": FAR, "d": NONE, "e": FAR, "f": NEAR},
        {"a": NONE, "b": NEAR, "c": WIDE, "d": NEAR, "e": (-9.5, -10.5, -8.5), "f": FAR},
    )
    one = findings.change(run, *run.models)
    assert (one.had, one.closed, one.unclear) == (["a", "b", "c", "e", "f"], ["a", "c"], ["c"])
    assert (one.left, one.nearer, one.farther, one.opened) == (["b", "e", "f"], ["b"], ["f"], ["d"])
    (said,) = answers(run, "Was it closed?")
    assert said == (
        f"closed 2 of the 5 gaps of {NAMES[0]}; in 1 of these the intervals of both overlap, and that they differ is "
        "not shown; 3 left, of which beyond both intervals 1 shrank and 1 grew; opened 1"
    )
    lead = words(findings.lead(run, wording.labels(run.models)))
    assert lead == (
        f"{NAMES[0]} has a gap in 5 of 6 metrics. {NAMES[1]} closed 2 of them (in 1 the intervals overlap), and opened "
        "1 more; what that cost in accuracy was not measured."
    )


def test_when_nothing_closed_it_says_so() -> None:
    run = made({"a": FAR, "b": NONE}, {"a": (9.5, 8.5, 10.5), "b": NONE})
    assert answers(run, "Was it closed?") == [
        f"none of the 1 gap of {NAMES[0]} was closed; 1 left, of which beyond both intervals 0 shrank and 0 grew"
    ]
    labels = wording.labels(run.models)
    assert words(findings.lead(run, labels)).endswith(f"{NAMES[1]} closed none of them.")
    run = made({"a": FAR}, {"a": FAR}, {"a": FAR})
    assert words(findings.lead(run, wording.labels(run.models))).endswith("No other model closed any of them.")


def test_where_there_is_no_gap_or_no_other_model() -> None:
    run = made({"a": NONE}, {"a": NONE})
    assert answers(run, "Was it closed?") == [f"{NAMES[0]} had no gap to close"]
    assert words(findings.lead(run, NAMES)) == (
        f"No gap was found between {NAMES[0]} and people in 1 metric. There was none to close."
    )
    run = made({"a": FAR})
    assert "one model only" in answers(run, "Was it closed?")[0]
    assert "no other model" in answers(run, "What did it cost?")[0]
    assert words(findings.lead(run, NAMES)) == f"{NAMES[0]} has a gap in 1 of 1 metric."
    run = made({"a": FAR}, kind=LEVEL)
    assert answers(run, "Is there a gap?") == ["unknown: no metric has a number, a floor and an interval"]
    run = made({"a": FAR}, {"a": FAR}, kind=LEVEL)
    assert answers(run, "Was it closed?") == [f"unknown: whether {NAMES[0]} had a gap is"]
    assert words(findings.lead(run, NAMES)).startswith(f"Whether {NAMES[0]} writes like people is unknown")


def test_no_more_gaps_than_chance_is_said() -> None:
    run = made({"m": FAR, **{f"m{at}": NONE for at in range(39)}})
    said = answers(run, "Is there a gap?")[-1]
    assert "passes about 2 of these floors by chance, and the gaps of 1 of the models above are no more" in said
    assert "no more" not in answers(made({f"m{at}": FAR for at in range(40)}), "Is there a gap?")[-1]


def test_the_cost_in_accuracy_has_its_error() -> None:
    first, *_, costly = evaluation(3).models
    assert findings.accuracy_change(first, costly, "arc-challenge") == pytest.approx((-8.0, 196 * 0.0155 * 2**0.5))
    said = answers(evaluation(3), "What did it cost?")
    assert said[0].startswith("on 4 of 4 tasks no change of accuracy is shown; perplexity on human text from ")
    assert said[1].startswith("accuracy lost on arc-easy (−6.0 points), arc-challenge (−8.0 points); on 2 of 4 tasks ")
    gained = replace(costly, retention=[replace(one, accuracy=one.accuracy + 0.4) for one in costly.retention])
    said = answers(replace(evaluation(2), models=[first, gained]), "What did it cost?")
    assert said[0].startswith("accuracy gained on lambada (+38.0 points), ")


def test_models_that_were_sampled_otherwise_are_told_so() -> None:
    run = made({"a": FAR}, {"a": FAR})
    first, other = run.models
    hot = replace(first, sampling=Sampling(temperature=0.7, seed=17))
    assert wording.labels([first, hot, other]) == [
        f"{NAMES[0]} (temperature 1)", f"{NAMES[0]} (temperature 0.7)", NAMES[1]
    ]  # fmt: skip
    assert wording.labels([first, first]) == [f"{NAMES[0]} #1", f"{NAMES[0]} #2"]
    assert "not sampled alike" in answers(replace(run, models=[first, hot]), "Was it closed?")[-1]
    assert "not sampled alike" not in answers(run, "Was it closed?")[-1]


def test_numbers() -> None:
    shown = {
        0.0: "0",
        1.0: "1.00",
        -12.345: "−12.3",
        1234.5: "1,234",
        0.05: "0.0500",
        2e-5: "2.0×10⁻⁵",
        -3e9: "−3.0×10⁹",
    }
    assert {value: wording.number(value) for value in shown} == shown
    assert wording.number(0.5, sign=True) == "+0.500"
    assert (wording.number(None), wording.span(None, 1)) == ("–", "–")
    assert wording.span(0.05, 0.16) == "0.050 to 0.160"


def test_distances_are_one_sided() -> None:
    """Without a difference the scale begins at 0, and no band lies left of it."""
    run = made({"a": FAR}, kind=DISTANCE)
    assert -1 < figures.scale(run, run.metrics).low < 0
    both = made({"a": FAR})
    assert figures.scale(both, both.metrics).low <= -2


def test_a_scale_ends_and_its_ticks_have_room() -> None:
    run = made({"a": (1e300, -1e300, 1e301), "b": NEAR})
    to = figures.scale(run, run.metrics)
    assert (to.low, to.high) == (-figures.MOST, figures.MOST)
    assert to.at(1e300, 0, 100) == 100
    for width in (300, 500):
        places = [to.at(tick, 0, width) for tick in to.ticks(44, width)]
        assert {-1, 0, 1} <= {*to.ticks(20, width)}
        assert all(after - before >= 44 for before, after in pairwise(places))
