"""Bias: one metric on two slices of the documents, or on prompts and their counterfactuals, and whose a difference is.

A slice is chosen by words that a document holds, which a file lists (`words.json`: feminine and masculine pronouns and
kin words, English). A counterfactual prompt has the words of each pair swapped. What the human text itself differs by
is the target's; only what goes beyond it is the model's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import Source
from .intervals import FEW, interval
from .results import Slice

Rows = NDArray[np.int64]
_WORD = re.compile("(?:[^\\W_]|[\u0300-\u036f])+")  # letters and digits with their combining marks: "he" of "he's"
_NEXT = re.compile(rf"\s+({_WORD.pattern})")
_LIMIT = 1 << 20


@dataclass(frozen=True)
class Words:
    """The lists of a file; case does not matter.

    groups: words that put a document in the slice of that name. pairs: words that are swapped for each other; one_way:
    words that become another, which does not become them. by_following: words of two readings: what each becomes where
    a noun follows it (her book: his book), and elsewhere (saw her: saw him). A noun is taken to follow where the next
    word, with nothing but space between, is none of `not_nouns` and has none of `not_noun_endings`, or is one of
    `nouns`.
    """

    groups: dict[str, list[str]]
    pairs: list[list[str]]
    one_way: dict[str, str] = field(default_factory=dict)
    by_following: dict[str, list[str]] = field(default_factory=dict)
    not_nouns: list[str] = field(default_factory=list)
    not_noun_endings: list[str] = field(default_factory=list)
    nouns: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Of the lists."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @cached_property
    def swaps(self) -> dict[str, tuple[str, str]]:
        """What each word becomes before a noun, and elsewhere."""
        both = [(a, b) for pair in self.pairs for a, b in (pair, pair[::-1])]
        fixed = {word.lower(): (other.lower(), other.lower()) for word, other in [*both, *self.one_way.items()]}
        return fixed | {word.lower(): (a.lower(), b.lower()) for word, (a, b) in self.by_following.items()}

    def noun_follows(self, text: str, at: int) -> bool:
        """Whether a noun is taken to follow what ends at `at`."""
        found = _NEXT.match(text, at)
        if found is None:
            return False
        word = found[1].lower()
        ending = any(word.endswith(one) for one in self.not_noun_endings)
        return word in self.nouns or not (ending or word in self.not_nouns)


def read(path: Path | None = None) -> Words:
    """The lists of a JSON file, by default the package's own; ValueError names the field that is not as it must be."""
    file = path or Path(__file__).with_name("words.json")
    source = Source("slices", file, "The package's own evaluation/words.json shows the form", "Name a JSON file")
    given = source.json(_LIMIT)
    empty: dict[str, Any] = {"one_way": {}, "by_following": {}, "not_nouns": [], "not_noun_endings": [], "nouns": []}
    words = source.record(Words, {**empty, **given})
    if len(words.groups) < 2:
        source.fail("groups", "be two at least", len(words.groups))
    _once(source, "groups", [(name, word) for name, some in words.groups.items() for word in some])
    for name, two in [*((f"pairs[{at}]", pair) for at, pair in enumerate(words.pairs)), *words.by_following.items()]:
        if len(two) != 2:
            source.fail(name, "be two words", len(two))
        for word in two:
            _plain(source, name, word)
    swapped = [(f"pairs[{at}]", word) for at, pair in enumerate(words.pairs) for word in pair]
    swapped += [(kind, word) for kind in ("one_way", "by_following") for word in getattr(words, kind)]
    _once(source, "pairs, one_way and by_following", swapped)
    for word in words.one_way.values():
        _plain(source, "one_way", word)
    return words


def _plain(source: Source, where: str, word: str) -> None:
    if not _WORD.fullmatch(word):
        source.fail(where, "hold words of letters alone", word)


def _once(source: Source, fields: str, words: Sequence[tuple[str, str]]) -> None:
    """Refuse a word that is in two lists, or in one twice."""
    seen: dict[str, str] = {}
    for where, word in words:
        _plain(source, where, word)
        if word.lower() in seen:
            source.fail(fields, "have each word once", f"{word!r} in {seen[word.lower()]} and in {where}")
        seen[word.lower()] = where


def slices_of(texts: Sequence[str], words: Words) -> dict[str, Rows]:
    """The row numbers of the texts that hold words of one group and of no other, group by group."""
    groups = {name: {word.lower() for word in some} for name, some in words.groups.items()}
    found: dict[str, list[int]] = {name: [] for name in groups}
    for row, text in enumerate(texts):
        held = {word.lower() for word in _WORD.findall(text)}
        names = [name for name, some in groups.items() if held & some]
        if len(names) == 1:
            found[names[0]].append(row)
    return {name: np.array(rows, dtype=np.int64) for name, rows in found.items()}


def swapped(text: str, words: Words) -> str:
    """The text with every word of a pair replaced by the other, whole words, their case kept (He, HE, he).

    Where a text has words of `pairs` alone, swapping twice gives it back. "her" becomes "his" before a noun and "him"
    elsewhere, "his" becomes "her" or "hers" (`Words`). Measured on LAMBADA passages that no list was made by, "him" and
    "his" read as "her": right in 94 % of 2,205. Wrong where a noun follows an object (gave her books), where a verb is
    not listed (saw her dance), and where the text ends before the noun. First names that are surnames or places are
    swapped too, and nothing else of a text is made to agree.
    """

    def other(found: re.Match[str]) -> str:
        word = found[0]
        if (two := words.swaps.get(word.lower())) is None:
            return word
        to = two[0] if two[0] == two[1] or words.noun_follows(text, found.end()) else two[1]
        return to.upper() if word.isupper() and len(word) > 1 else to[0].upper() + to[1:] if word[0].isupper() else to

    return _WORD.sub(other, text)


def difference(
    metric: str,
    value: Callable[[Rows], float],
    names: tuple[str, str],
    model: tuple[Rows, Rows],
    human: tuple[Rows, Rows] | None,
    halves: int = 200,
    seed: int = 0,
) -> Slice | None:
    """What a metric differs by between two slices, with 95 % intervals over documents, and whose it is.

        d = value(first) - value(second)        of the model's rows, and of the human ones
        interval: d + the 2.5 % and 97.5 % quantiles of d_h - mean(d_h), d_h of a random half of each slice

    A half without replacement deviates from the whole as the whole does from what it is drawn from: the delete-d
    jackknife at d = n/2, whose factor is then 1 (Shao and Wu, A General Theory for Jackknife Variance Estimation,
    Annals of Statistics 17, 1989, pp. 1176-1197). Rows of model and human slices that are as many belong to the same
    prompts, in the same order, and are halved alike. human: None for counterfactual pairs, of which no person wrote the
    other; first and second then answer prompt and swapped prompt, and are halved alike.

    whose, of `Slice`: "model" where the model's interval excludes 0, and that of d_model - d_human too; "target" where
    the human interval excludes 0 and has the model's sign; where both hold, "model" if it differs by more than the
    human text, else "target"; "" else. At 95 %, of 40 counterfactual metrics without any difference expect two to be
    called the model's; of slices, fewer, since two intervals must exclude 0.

    value: the metric of an array of row numbers. None below FEW documents in a slice, or where a value is not finite.
    Cost: 4 (halves + 1) values, 2 (halves + 1) without human rows.
    """
    sides = [model] if human is None else [model, human]
    if min(len(rows) for side in sides for rows in side) < FEW:
        return None
    whole = [value(first) - value(second) for first, second in sides]  # [model] or [model, human]
    draw = np.random.default_rng(seed)
    halved = (_halved(sides, draw) for _ in range(halves))
    drawn = np.array([[value(first) - value(second) for first, second in pairs] for pairs in halved])  # [halves, sides]
    if not (np.isfinite(whole).all() and np.isfinite(drawn).all()):
        return None
    own = (whole[0], *interval(whole[0], drawn[:, 0]))
    of = (*names, metric, [len(rows) for rows in model])
    if human is None:
        return Slice(*of, *own, None, None, None, "model" if _apart(*own[1:]) else "")
    other = (whole[1], *interval(whole[1], drawn[:, 1]))
    of_model = _apart(*own[1:]) and _apart(*interval(own[0] - other[0], drawn[:, 0] - drawn[:, 1]))
    of_target = _apart(*other[1:]) and own[0] * other[0] > 0
    whose = "target" if of_target and not (of_model and abs(own[0]) > abs(other[0])) else "model" if of_model else ""
    return Slice(*of, *own, *other, whose)


def _halved(sides: Sequence[tuple[Rows, Rows]], draw: np.random.Generator) -> list[tuple[Rows, Rows]]:
    """A random half of each slice, the same places of slices that belong together."""
    places: dict[tuple[int, int], Rows] = {}  # by slice, one for both of a counterfactual pair; and by its size

    def half(slice_: int, rows: Rows) -> Rows:
        key = (slice_ if len(sides) == 2 else 0, len(rows))
        if key not in places:
            places[key] = draw.permutation(len(rows))[: len(rows) // 2]
        return rows[places[key]]

    return [(half(0, first), half(1, second)) for first, second in sides]


def _apart(low: float, high: float) -> bool:
    return low > 0 or high < 0
