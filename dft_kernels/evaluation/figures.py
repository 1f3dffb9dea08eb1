"""The pictures of a report: the forest of all metrics, the style diversity score, distributions against human text.

Wide pictures are for `WIDE` units, narrow ones for a phone; see svg.py.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..targets.punctuation import CLASSES
from .results import DISTANCE, About, Evaluated, Evaluation, Value
from .svg import BAND, HUMAN, HUMAN_LINE, INK, MUTED, RULE, Picture, plain, tint
from .wording import by_name, interval, number, span, titled

WIDE, NARROW, SMALL = 720, 328, 300
MOST = 10_000  # floors that a forest shows

# ---- the forest


@dataclass(frozen=True)
class Scale:
    """Of value / floor: linear to one floor, logarithmic beyond; 0 in the middle unless all is one-sided."""

    low: float
    high: float

    @staticmethod
    def bent(value: float) -> float:
        """As an ordinary symmetric logarithm."""
        return math.copysign(abs(value) if abs(value) <= 1 else 1 + math.log10(abs(value)) * 1.4, value)

    def at(self, value: float, left: float, right: float) -> float:
        """The place of a value between two ends, at which it stops."""
        value = min(max(value, self.low), self.high)
        low, high = self.bent(self.low), self.bent(self.high)
        return left + (right - left) * (self.bent(value) - low) / (high - low)

    def ticks(self, apart: float, width: float) -> list[float]:
        """-1, 0, 1, powers of ten, and threes where there is room for text `apart` wide."""
        limit, powers = max(-self.low, self.high), [1.0]
        while powers[-1] * 10 <= limit:
            powers.append(powers[-1] * 10)
        found = [0.0]
        for value in [*powers, *(3 * one for one in powers)]:
            for signed in (value, -value):
                place = self.at(signed, 0, width)
                if self.low <= signed <= self.high and all(abs(place - self.at(o, 0, width)) >= apart for o in found):
                    found.append(signed)
        return sorted(found)


def hidden(value: Value | None) -> str:
    """Why a value is not in the forest, "" where it is."""
    if value is None:
        return "not in its run"
    if value.value is None:
        return value.note or "not measured"
    return "" if value.floor else "has no floor" if value.floor is None else "its floor is 0"


def _floors(value: Value) -> list[float]:
    """(low, value, high) in floors, or the value alone."""
    assert value.value is not None and value.floor  # noqa: PT018 - as hidden() has it
    ends = (value.low, value.value, value.high)
    known = [one for one in ends if one is not None]
    return [one / value.floor for one in (known if len(known) == 3 else [value.value])]


def scale(run: Evaluation, abouts: Sequence[About]) -> Scale:
    """One for all groups."""
    names = {about.name for about in abouts}
    found = [
        x
        for model in run.models
        for value in model.values
        if value.metric in names and not hidden(value)
        for x in _floors(value)
    ]
    two_sided = any(about.kind != DISTANCE for about in abouts)
    low, high = min([0.0, *found]), max([0.0, *found])
    return Scale(max(-MOST, min(1.15 * low, -2.0 if two_sided else -0.2)), min(MOST, max(1.15 * high, 2.0)))


def forest(
    run: Evaluation, labels: Sequence[str], group: Sequence[About], to: Scale, name: str, narrow: bool = False
) -> str:
    """The metrics of a group, every model below the other in units of the floor."""
    width, models = (NARROW if narrow else WIDE), len(run.models)
    left, right, step, top = (10 if narrow else 236), width - 12, 10, 26
    lines = [_wrapped(about.name, 44 if narrow else 32) for about in group]
    head = [17 * len(one) + 8 if narrow else 0 for one in lines]
    heights = [max(step * models, 0 if narrow else 16 * len(one)) + 12 for one in lines]
    bottom = top + sum(head) + sum(heights)
    with plain():
        picture = Picture(width, bottom + 24)
        ticks = to.ticks(30 if max(-to.low, to.high) < 1000 else 44, right - left)
        for tick in ticks:
            x = to.at(tick, left, right)
            ends = [(top - 6, bottom + 4)]
            if narrow:  # not through the names
                starts = [top + sum(head[: at + 1]) + sum(heights[:at]) for at in range(len(group))]
                ends = [(start, start + height) for start, height in zip(starts, heights, strict=True)]
            for end in ends:
                picture.line([x, x], end, INK if tick == 0 else RULE, linewidth=1 if tick else 1.2)
            for place in (9.0, bottom + 15.0):
                picture.text(x, place, f"{tick:g}".replace("-", "−"), MUTED, "center")
        y = float(top)
        for about, words, above, height in zip(group, lines, head, heights, strict=True):
            for at, line in enumerate(words):
                middle = y + 14 + 17 * at if narrow else y + height / 2 + 16 * (at - (len(words) - 1) / 2)
                picture.text(0, middle, line)
            y += above
            least = 0.0 if about.kind == DISTANCE else -1.0
            said = "human text against itself: 95 % of it lies here"
            picture.box(to.at(least, left, right), y + 2, to.at(1, left, right), y + height - 2, BAND, said)
            for tick in ticks:
                x = to.at(tick, left, right)
                if least <= tick <= 1:
                    picture.line([x, x], [y + 2, y + height - 2], INK if tick == 0 else RULE)
            for at, (label, model) in enumerate(zip(labels, run.models, strict=True)):
                value = by_name(model.values).get(about.name)
                if value is not None and not hidden(value):
                    xs = [to.at(x, left, right) for x in _floors(value)]
                    place = y + height / 2 + step * (at - (models - 1) / 2)
                    picture.mark(xs, place, at, titled(label, about, value, "value / floor") + _ratio(value))
            y += height
        many = f"{len(group)} metrics of {models} models" if models > 1 else f"{len(group)} metrics"
        said = f"{many}: value divided by its floor, with 95 % intervals; the shaded band is one floor of human text. "
        said += "The table of all metrics has these numbers."
        return picture.svg(name, f"Forest plot: {group[0].group}", said, "narrow" if narrow else "wide")


def _ratio(value: Value) -> str:
    return f"; value / floor {number(value.ratio)}"


def _wrapped(text: str, width: int) -> list[str]:
    if any(unicodedata.east_asian_width(one) in "WF" for one in text):
        width //= 2  # such a character is two wide
    return textwrap.wrap(" ".join(text.split()), width, max_lines=2, placeholder=" …") or [""]


# ---- the score and the distributions


def score(run: Evaluation, labels: Sequence[str], name: str, narrow: bool = False) -> str:
    """The style diversity scores on 0..100, with the band of human text."""
    width, left = (NARROW if narrow else WIDE), 12
    scored = [(at, model.score) for at, model in enumerate(run.models) if model.score is not None]
    right, top, step = width - 16, 24, 26
    bottom = top + step * len(scored)

    def place(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0), 100.0) / 100

    with plain():
        picture = Picture(width, bottom + 24)
        if len(run.human_score) == 3:
            low, middle, high = run.human_score
            said = f"human text: median {number(middle)}, 5 % to 95 % {span(low, high)}"
            picture.box(place(low), top, place(high), bottom, BAND, said)
            picture.line([place(middle)] * 2, [top, bottom], HUMAN_LINE, linewidth=1.6)
            picture.text(place(middle), 11, "human text", MUTED, "right" if middle > 80 else "center")
        for tick in range(0, 101, 25 if narrow else 10):
            picture.line([place(tick)] * 2, [top, bottom], RULE, linewidth=0.6)
            picture.text(place(tick), bottom + 13, str(tick), MUTED, "center")
        for row, (at, one) in enumerate(scored):
            note = f"{labels[at]}: style diversity score {number(one.value)}, {interval(one.low, one.high)}"
            picture.mark([place(x) for x in (one.low, one.value, one.high)], top + step * (row + 0.5), at, note)
        return picture.svg(name, "Style diversity score", "Scores from 0 to 100 with 95 % intervals and the band of "
                           "human text; the table below has the numbers.", "narrow" if narrow else "wide")  # fmt: skip


def distributions(run: Evaluation, labels: Sequence[str], what: str, name: str) -> list[tuple[int, str]]:
    """A picture for each model that has this histogram, all to one scale."""
    human = run.human_histograms.get(what, [])
    those = [(at, model) for at, model in enumerate(run.models) if model.histograms.get(what)]
    if not human or any(len(model.histograms[what]) != len(human) for _, model in those):
        return []
    marks = len(human) == len(CLASSES) and "punctuation" in what
    draw = _classes if marks else _lengths
    with plain():
        return [(at, draw(human, model, at, labels[at], what, those, f"{name}-{at}")) for at, model in those]


def _classes(
    human: Sequence[float],
    model: Evaluated,
    at: int,
    label: str,
    what: str,
    those: Sequence[tuple[int, Evaluated]],
    name: str,
) -> str:
    """Horizontal bars of people, and the model's marker on each."""
    left, right, top, step = 84, SMALL - 18, 6, 21
    most = max([*human, *(x for _, one in those for x in one.histograms[what]), 1e-9])
    bottom = top + step * len(human)
    picture = Picture(SMALL, bottom + 24)

    def place(share: float) -> float:
        return left + (right - left) * share / most

    _shares(picture, place, most, top, bottom)
    for row, (mark, people, share) in enumerate(zip(CLASSES, human, model.histograms[what], strict=True)):
        y = top + step * row
        picture.text(left - 8, y + step / 2, mark.replace("_", " "), INK, "right")
        said = f"{mark.replace('_', ' ')}: human {100 * people:.1f} %, {label} {100 * share:.1f} %"
        picture.box(left, y + 4, place(people), y + step - 4, HUMAN, said)
        picture.line([left, place(share)], [y + step / 2] * 2, tint(at), linewidth=1.4)
        picture.mark([place(share)], y + step / 2, at, said)
    said = f"{what} of {label} against human text, shares of all marks by class"
    return picture.svg(name, f"{what}: {label}", said)


def _shares(picture: Picture, place: Any, most: float, top: float, bottom: float) -> None:
    """Vertical lines at a few shares."""
    step = next(one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0) if most / one <= 4.5 or one == 1.0)
    for tick in (step * n for n in range(int(most / step + 1e-9) + 1)):
        picture.line([place(tick)] * 2, [top, bottom], RULE, linewidth=0.8)
        picture.text(place(tick), bottom + 13, f"{100 * tick:.0f} %", MUTED, "center")


def _lengths(
    human: Sequence[float],
    model: Evaluated,
    at: int,
    label: str,
    what: str,
    those: Sequence[tuple[int, Evaluated]],
    name: str,
) -> str:
    """People as a filled outline, the model as a line, by bins of as many words as make it readable."""
    every = [human, *(one.histograms[what] for _, one in those)]
    longest = max((n for one in every for n in range(len(one)) if sum(one[n:]) > 0.005), default=0) + 1
    wide = max(1, math.ceil(longest / 30))
    starts = range(0, longest, wide)

    def binned(one: Sequence[float]) -> list[float]:
        return [sum(one[n : n + wide] if n + wide < longest else one[n:]) for n in starts]

    left, right, top, bottom = 40, SMALL - 8, 12, 160
    most = max([x for one in every for x in binned(one)] + [1e-9])
    picture = Picture(SMALL, bottom + 40)

    def outline(one: Sequence[float]) -> tuple[list[float], list[float]]:
        edges = [left + (right - left) * n / len(one) for n in range(len(one) + 1)]
        heights = [bottom - (bottom - top) * x / most for x in one]
        return [x for x in edges for _ in (0, 1)][1:-1], [y for y in heights for _ in (0, 1)]

    step = next(one for one in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if most / one <= 5.5 or one == 1.0)
    for tick in (step * n for n in range(int(most / step + 1e-9) + 1)):
        y = bottom - (bottom - top) * tick / most
        picture.line([left, right], [y, y], RULE, linewidth=0.8)
        picture.text(left - 6, y, f"{100 * tick:.0f} %", MUTED, "right")
    xs, ys = outline(binned(human))
    picture.axes.fill([xs[0], *xs, xs[-1]], [bottom, *ys, bottom], color=HUMAN, linewidth=0)
    picture.line(xs, ys, HUMAN_LINE, linewidth=1)
    xs, ys = outline(binned(model.histograms[what]))
    picture.line(xs, ys, tint(at), linewidth=1.8)
    for row, start in enumerate(starts):
        x, size = left + (right - left) * row / len(starts), (right - left) / len(starts)
        if row % max(1, len(starts) // 5) == 0 and x + size / 2 < right - 46:
            picture.text(x + size / 2, bottom + 12, str(start), MUTED, "center")
    picture.text(right, bottom + 12, f"{starts[-1]}+", MUTED, "right")
    picture.text((left + right) / 2, bottom + 30, "words of a sentence" if "words" in what else what, MUTED, "center")
    people, mine = (_mean(one) for one in (human, model.histograms[what]))
    said = f"{what} of {label} against human text, shares in bins of {wide}; mean {mine:.1f}, human {people:.1f}"
    return picture.svg(name, f"{what}: {label}", said)


def _mean(shares: Sequence[float]) -> float:
    return sum(n * x for n, x in enumerate(shares)) / (sum(shares) or 1.0)


def left_out(run: Evaluation, abouts: Sequence[About], labels: Sequence[str]) -> list[tuple[str, str, str]]:
    """What the forest does not show: (metric, models, why)."""
    found = []
    for about in abouts:
        why: dict[str, list[str]] = {}
        for label, model in zip(labels, run.models, strict=True):
            if said := hidden(by_name(model.values).get(about.name)):
                why.setdefault(said, []).append(label)
        for said, those in why.items():
            whose = "every model" if len(those) == len(labels) > 1 else ", ".join(those)
            found.append((about.name, whose, said))
    return found
