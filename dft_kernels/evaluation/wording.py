"""How a report prints what a file holds: numbers, names of models, and texts that may hold anything."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from .results import About, Evaluated, Value

T = TypeVar("T")
Z95 = 1.96  # standard errors of a 95 % interval
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")  # embeddings, overrides and isolates of writing direction


@dataclass(frozen=True)
class Cell:
    """A number as it is printed, and in `title` what it is. share: of 0..1, drawn as a bar behind it."""

    text: str
    title: str
    share: float | None = None


Said = Sequence["str | Cell"]  # a sentence with its numbers
MISSING = "–"


def number(value: float | None, sign: bool = False, like: float | None = None) -> str:
    """Three digits that count, with a true minus. sign: + too; like: as many decimals as this number has."""
    if value is None:
        return MISSING
    size, plus = abs(value if like is None else like), "+" if sign else ""
    if size and not 1e-4 <= size < 1e7:
        power = math.floor(math.log10(size))
        return f"{value / 10**power:{plus}.1f}×10{str(power).translate(_RAISED)}".replace("-", "−")
    digits = 0 if size >= 100 or not size else 2 - math.floor(math.log10(size))
    return f"{value:{plus},.{digits}f}".replace("-", "−") if value else "0"


def span(low: float | None, high: float | None, sign: bool = False) -> str:
    """An interval, as text."""
    if low is None or high is None:
        return MISSING
    widest = max(abs(low), abs(high))
    return f"{number(low, sign, widest)} to {number(high, sign, widest)}"


def interval(low: float | None, high: float | None) -> str:
    """An interval as a title says it."""
    return "no interval" if low is None or high is None else f"95 % interval {span(low, high)}"


def titled(label: str, about: About, value: Value, what: str = "") -> str:
    """What a number of a metric is. what: which of them, by default the value itself."""
    unit = f", {about.unit}" if about.unit else ""
    if value.value is None:
        return f"{label}: {about.name}{unit}: no number: {value.note or 'not measured'}"
    said = f"{what} of {about.name}" if what else about.name
    return (
        f"{label}: {said}{unit}; value {number(value.value)}, {interval(value.low, value.high)}, "
        f"floor {number(value.floor)}, {value.documents:,} documents"
    )


def labels(models: Sequence[Evaluated]) -> list[str]:
    """A name for each, none twice: models of one name are told apart by how they were sampled, or counted."""
    names = [" ".join(model.name.split()) or "(no name)" for model in models]
    found = []
    for name, model in zip(names, models, strict=True):
        same = [other.sampling for other, called in zip(models, names, strict=True) if called == name]
        differ = [one.name for one in fields(model.sampling) if len({getattr(each, one.name) for each in same}) > 1]
        said = ", ".join(f"{one.replace('_', '-')} {getattr(model.sampling, one):g}" for one in differ)
        found.append(f"{name} ({said})" if said else name)
    counts, seen = Counter(found), Counter[str]()
    for at, label in enumerate(found):
        seen[label] += 1
        if counts[label] > 1:
            found[at] = f"{label} #{seen[label]}"
    return found


def visible(text: str) -> str:
    """A text in which what steers a terminal, a parser or the direction of writing is shown by its number."""
    text = text.replace("\r\n", "\n")
    shown = (
        f"⟨U+{ord(one):04X}⟩"
        if (one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cs"))
        or _TURNING.match(one)
        or ord(one) & 0xFFFE == 0xFFFE  # no character, by Unicode and XML
        else one
        for one in text
    )
    return text if text.isascii() and text.isprintable() else "".join(shown)


def cleaned(found: T) -> T:
    """A record of which every text, name and key is `visible`."""
    value: Any = found
    if isinstance(value, str):
        value = visible(value)
    elif isinstance(value, list):
        value = [cleaned(one) for one in value]
    elif isinstance(value, dict):
        value = {visible(name): cleaned(one) for name, one in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        value = replace(value, **{one.name: cleaned(getattr(value, one.name)) for one in fields(value)})
    return value


def by_name(values: Iterable[Value]) -> dict[str, Value]:
    """Values by their metric."""
    return {value.metric: value for value in values}
