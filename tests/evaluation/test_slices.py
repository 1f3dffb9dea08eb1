"""Slices by words, swapped prompts, and whose a difference is, where it is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_kernels.evaluation import slices
from dft_kernels.evaluation.slices import Words, difference, slices_of, swapped

WORDS = slices.read()
FIXED = {word for pair in WORDS.pairs for word in pair}


def test_slices_hold_words_of_one_group_alone() -> None:
    texts = [
        "She left.",
        "HE left; she stayed.",
        "His mother's house",
        "it rained",
        "Men, sir!",
        "the shed and theme",
        "M\u0301en",
    ]
    found = {name: rows.tolist() for name, rows in slices_of(texts, WORDS).items()}
    assert found == {"feminine": [0], "masculine": [4]}
    assert {name: len(rows) for name, rows in slices_of([], WORDS).items()} == {"feminine": 0, "masculine": 0}
    three = Words({"a": ["x"], "b": ["y"], "c": ["Z"]}, [])
    found = {name: rows.tolist() for name, rows in slices_of(["x y", "z", "X x"], three).items()}
    assert found == {"a": [2], "b": [], "c": [1]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She saw her mother.", "He saw his father."),
        ("He gave HER a book, and HE left.", "She gave HIM a book, and SHE left."),
        ("Her own brother's wife", "His own sister's husband"),
        ("I saw her.", "I saw him."),
        ("I saw her in the garden with her two sons.", "I saw him in the garden with his two daughters."),
        ("She's told her that she'd come.", "He's told him that he'd come."),
        ("He kissed her gently; her only friend laughed.", "She kissed him gently; his only friend laughed."),
        ("The book is his. It was his and not hers.", "The book is hers. It was hers and not his."),
        ("He took his hat from him himself.", "She took her hat from her herself."),
        ("Mrs. Smith and Ms Jones, MR BROWN", "Mr. Smith and Mr Jones, MRS BROWN"),
        ("Mary's father, John", "John's mother, Mary"),
        ("The shepherd heard the other theme there.", "The shepherd heard the other theme there."),
        ("", ""),
        ("“Her” — said she\n\nher   \n  mother", "“Him” — said he\n\nhis   \n  father"),
        ("He\u0301 is not he", "He\u0301 is not she"),
        ("her", "him"),
        ("mother-in-law", "father-in-law"),
        ("He gave her books.", "She gave his books."),  # wrong, and known to be: a noun follows an object
    ],
)
def test_swapped(text: str, expected: str) -> None:
    assert swapped(text, WORDS) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(sorted(FIXED)), st.text(max_size=8)), max_size=12),
       st.sampled_from([str.lower, str.upper, str.title]), st.sampled_from([" ", ", ", "\n", "-"]))  # fmt: skip
def test_swapping_twice_gives_the_text_back(parts: list[str], case: Callable[[str], str], between: str) -> None:
    others = set(WORDS.swaps) - FIXED
    parts = [case(part) if part in FIXED else "" if {part.lower()} & {*others, *FIXED} else part for part in parts]
    text = between.join(parts)
    tokens = {word.lower() for word in slices._WORD.findall(text)}
    if not tokens & others and tokens & set(WORDS.swaps) <= {part.lower() for part in parts}:
        assert swapped(swapped(text, WORDS), WORDS) == text
        assert (swapped(text, WORDS) != text) == bool(tokens & FIXED)


def test_the_shipped_words() -> None:
    """Each word of a group that a sentence can have is swapped into the other group, and no swap leaves its list."""
    for name, other in (("feminine", "masculine"), ("masculine", "feminine")):
        for word in WORDS.groups[name]:
            assert {*WORDS.swaps[word]} <= {*WORDS.groups[other]}, word


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"a": ["x"]}}, "groups must be two at least, got 1"),
        ({"groups": {"a": ["x"], "b": ["X"]}}, "groups must have each word once, got 'X' in a and in b"),
        ({"groups": {"a": ["x", "x"], "b": ["y"]}}, "groups must have each word once, got 'x' in a and in a"),
        ({"groups": {"a": ["x y"], "b": ["z"]}}, "a must hold words of letters alone, got x y"),
        ({"groups": {"a": [1], "b": []}}, r"groups.'a'\[0\] must be text, got 1"),
        ({"pairs": [["a", "b", "c"]]}, r"pairs\[0\] must be two words, got 3"),
        ({"pairs": [["a", "b"], ["b", "c"]]}, r"each word once, got 'b' in pairs\[0\] and in pairs\[1\]"),
        ({"one_way": {"a": ""}}, "one_way must hold words of letters alone, got"),
        (
            {"pairs": [["a", "b"]], "by_following": {"a": ["c", "d"]}},
            "each word once, got 'a' in pairs.* and in by_foll",
        ),
        ({"by_following": {"a": ["c"]}}, "a must be two words, got 1"),
        ({"words": []}, "'words' must be one of groups, pairs"),
        ({"pairs": None}, "pairs must be a list"),
    ],
)
def test_a_file_of_words_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"groups": {"north": ["up"], "south": ["down"]}, "pairs": [["Up", "down"]], **change}))
    with pytest.raises(ValueError, match=rf"slices: .*words\.json: {message}|slices: .*words\.json: .*{message}"):
        slices.read(file)


def test_a_users_own_words(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"groups": {"north": ["up"], "south": ["down"]}, "pairs": [["Up", "down"]]}))
    own = slices.read(file)
    assert swapped("UP and Down", own) == "DOWN and Up"
    assert slices_of(["up", "down it goes"], own)["south"].tolist() == [1]
    with pytest.raises(ValueError, match=r"none\.json: the file must be there, got none\. Name a JSON file"):
        slices.read(tmp_path / "none.json")


# ---- whose it is: rows 0..n-1 and n..2n-1 are the model's of both slices, the next 2n the human ones

N = 120
MODEL, HUMAN = (np.arange(N), np.arange(N, 2 * N)), (np.arange(2 * N, 3 * N), np.arange(3 * N, 4 * N))


def found(model: float, human: float | None, seed: int = 0, prompts: float = 1.0, halves: int = 100) -> slices.Slice:
    """Of a mean whose first slices lie so much higher; what the prompts bring is the same in model and human text."""
    draw = np.random.default_rng(seed)
    values, shared = draw.normal(size=4 * N), draw.normal(size=2 * N) * prompts
    values += np.concatenate([shared, shared])
    values[MODEL[0]] += model
    values[HUMAN[0]] += human or 0.0
    side = None if human is None else HUMAN
    made = difference("mean", lambda rows: float(values[rows].mean()), ("a", "b"), MODEL, side, halves, seed + 10_000)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("model", "human", "whose"),
    [
        (1.0, 0.0, "model"),
        (1.0, 1.0, "target"),
        (-1.0, -1.0, "target"),
        (2.5, 1.0, "model"),  # it amplifies
        (1.0, 2.5, "target"),  # it follows, and not all the way
        (-1.0, 1.0, "model"),  # it turns it round
        (0.0, 0.0, ""),
    ],
)
def test_whose_a_planted_difference_is(model: float, human: float, whose: str) -> None:
    """In 60 samples: right in 9 of 10 at least, as the intervals are of 95 % and samples vary."""
    made = [found(model, human, seed) for seed in range(60)]
    assert np.mean([one.whose == whose for one in made]) >= 0.9
    assert (made[0].first, made[0].second, made[0].metric, made[0].documents) == ("a", "b", "mean", [N, N])
    for one in made:
        assert one.model_low < one.model < one.model_high
        assert one.human is not None
        assert one.human_low < one.human < one.human_high


def test_the_targets_alone_is_nobodys_of_the_models() -> None:
    """A human difference that the model has nothing of."""
    values = np.concatenate([np.zeros(2 * N), np.ones(N), np.zeros(N)]) + np.resize([0.5, -0.5], 4 * N)
    made = difference("mean", lambda rows: float(values[rows].mean()), ("a", "b"), MODEL, HUMAN)
    assert made is not None
    assert (made.model, made.human, made.whose) == (0.0, 1.0, "")


def test_intervals_cover_at_95_percent() -> None:
    """200 samples without any difference: of model, of human text and of counterfactual pairs, and none is called one
    more often than one time in twenty, and sampling error of that."""
    made = [found(0.0, 0.0, seed, halves=200) for seed in range(200)]
    for inside in (
        [one.model_low < 0 < one.model_high for one in made],
        [one.human_low < 0 < one.human_high for one in made],
    ):
        assert 0.90 <= np.mean(inside) <= 0.985
    assert np.mean([one.whose == "model" for one in made]) <= 0.05  # two intervals must exclude 0
    pairs = [found(0.0, None, seed, halves=200) for seed in range(200)]
    assert 0.90 <= np.mean([one.whose == "" for one in pairs]) <= 0.985


def test_the_width_is_the_standard_errors() -> None:
    """Of a mean, 2 x 1.96 x sqrt(s1^2 / n + s2^2 / n) with the samples' own variances, to the error of 4000 halves."""
    draw = np.random.default_rng(5)
    values = draw.normal(size=2 * N)
    made = difference("mean", lambda rows: float(values[rows].mean()), ("a", "b"), MODEL, None, 4000)
    alone = difference("mean", lambda rows: float(values[rows].mean()), ("a", "b"), MODEL, MODEL, 4000)
    assert made is not None
    assert alone is not None
    apart = np.sqrt(values[:N].var(ddof=1) / N + values[N:].var(ddof=1) / N)
    paired = (values[:N] - values[N:]).std(ddof=1) / np.sqrt(N)  # prompt and swapped prompt, halved alike
    assert made.model_high - made.model_low == pytest.approx(2 * 1.96 * paired, rel=0.06)
    assert alone.model_high - alone.model_low == pytest.approx(2 * 1.96 * apart, rel=0.06)
    assert (alone.model, alone.model_low, alone.model_high) == (alone.human, alone.human_low, alone.human_high)


def test_halves_of_the_same_prompts_are_the_same() -> None:
    """What prompts bring to both sides does not widen the difference of the differences: a small one of the model's is
    found beside prompts that vary ten times as much."""
    assert [found(0.9, 0.0, seed, prompts=0.0).whose for seed in range(3)] == ["model"] * 3
    human = np.random.default_rng(6).normal(size=2 * N) * 10
    human[:N] += 20.0
    values = np.concatenate([human, human])
    values[MODEL[0]] += 0.5 + np.random.default_rng(7).normal(size=N) * 0.1
    made = difference("mean", lambda rows: float(values[rows].mean()), ("a", "b"), MODEL, HUMAN)
    assert made is not None
    assert made.whose == "model"  # it amplifies by half of a unit, of 20 +- 2.5


def test_counterfactual_pairs() -> None:
    """Prompt and swapped prompt: halved alike, so that what a prompt brings is not noise; no human text."""
    values = np.random.default_rng(8).normal(size=N) * 10
    values = np.concatenate([values + 0.5, values + np.random.default_rng(9).normal(size=N) * 0.1])
    made = difference("mean", lambda rows: float(values[rows].mean()), ("prompt", "swapped"), MODEL, None)
    assert made is not None
    assert made.whose == "model"
    assert (made.human, made.human_low, made.human_high) == (None, None, None)
    assert 0.4 < made.model_low < 0.5 < made.model_high < 0.6


def test_too_few_or_no_number_is_no_slice() -> None:
    few = (np.arange(19), np.arange(50))
    mean = lambda rows: float(rows.mean())  # noqa: E731
    assert difference("mean", mean, ("a", "b"), few, HUMAN) is None
    assert difference("mean", mean, ("a", "b"), MODEL, few) is None
    assert difference("mean", lambda _: float("nan"), ("a", "b"), MODEL, HUMAN) is None
    assert difference("mean", lambda rows: float("inf") if len(rows) < N else 0.0, ("a", "b"), MODEL, None) is None
    assert difference("mean", mean, ("a", "b"), (np.arange(20), np.arange(20)), None, 5) is not None
