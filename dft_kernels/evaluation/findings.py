"""What the numbers of a run answer: is there a gap, was it closed, what did it cost. In words, computed.

A metric has a gap where |value| > floor and the interval of the value excludes 0. It was closed where the first model
has a gap and another has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace

from .results import LEVEL, Evaluated, Evaluation, Value
from .wording import Z95, Cell, Said, by_name, interval, number, span, titled


def has_gap(value: Value) -> bool | None:
    """Whether a metric has a gap; None where it cannot be told: no number, floor or interval."""
    if value.value is None or value.floor is None or value.low is None or value.high is None:
        return None
    return abs(value.value) > value.floor and not value.low <= 0 <= value.high


def judged(run: Evaluation, model: Evaluated) -> dict[str, bool]:
    """By metric, in the run's order, whether there is a gap; levels have no human text to be held against."""
    of = by_name(model.values)
    found = {about.name: has_gap(of[about.name]) for about in run.metrics if about.kind != LEVEL and about.name in of}
    return {name: gap for name, gap in found.items() if gap is not None}


@dataclass(frozen=True)
class Answer:
    """A sentence, of the model with this number or of all; metrics: what it counts, by name, for who asks which."""

    model: int | None
    said: Said
    metrics: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """The gaps of the first model and of another, over the metrics that both were judged by. unclear: closed, though
    the intervals of both sizes overlap; nearer, farther: left, and smaller or larger beyond their intervals."""

    had: list[str]
    closed: list[str]
    unclear: list[str]
    left: list[str]
    nearer: list[str]
    farther: list[str]
    opened: list[str]
    unknown: list[str]  # had, and not judged in the other


def change(run: Evaluation, first: Evaluated, other: Evaluated) -> Change:
    """From the first model to another."""
    before, after, was, now = judged(run, first), judged(run, other), by_name(first.values), by_name(other.values)
    had = [name for name, gap in before.items() if gap]
    closed = [name for name in had if after.get(name) is False]
    left = [name for name in had if after.get(name)]
    order = {name: _apart(_size(was[name]), _size(now[name])) for name in (*closed, *left)}
    return Change(
        had=had,
        closed=closed,
        unclear=[name for name in closed if order[name] == 0],
        left=left,
        nearer=[name for name in left if order[name] < 0],
        farther=[name for name in left if order[name] > 0],
        opened=[name for name, gap in after.items() if gap and before.get(name) is False],
        unknown=[name for name in had if name not in after],
    )


def _apart(was: Value, now: Value) -> int:
    """-1, 1: lower or higher beyond both intervals; 0: they overlap."""
    (low, high), (least, most) = ((float(one.low or 0), float(one.high or 0)) for one in (was, now))
    return -1 if most < low else 1 if least > high else 0


def _size(value: Value) -> Value:
    """|value| with its interval."""
    low, high = float(value.low or 0), float(value.high or 0)
    ends = sorted((abs(low), abs(high)))
    return replace(value, value=abs(value.value or 0), low=0.0 if low <= 0 <= high else ends[0], high=ends[1])


def lead(run: Evaluation, labels: Sequence[str]) -> Said:
    """The answer in two sentences. Of several models the one that closed most, and of these opened least, stands for
    all."""
    first, found = labels[0], judged(run, run.models[0])
    gaps = [name for name, gap in found.items() if gap]
    many = Cell(str(len(found)), f"{first}: metrics that have a number, a floor and an interval")
    if not found:
        return [f"Whether {first} writes like people is unknown: no metric has a number, a floor and an interval."]
    said: list[str | Cell] = [f"{first} has a gap in ", _count(gaps, f"{first}: metrics with a gap"), " of ", many]
    metrics = _many(found, "metric")
    said = (
        [*said, f" {metrics}."] if gaps else [f"No gap was found between {first} and people in ", many, f" {metrics}."]
    )
    if len(run.models) == 1:
        return said
    changes = [change(run, run.models[0], model) for model in run.models[1:]]
    order = sorted(range(len(changes)), key=lambda at: (-len(changes[at].closed), len(changes[at].opened)))
    best = order[0]
    one, label = changes[best], labels[best + 1]
    many = _count(one.closed, f"{label}: gaps of {first} that it closed")
    if not gaps:
        return [*said, " There was none to close."]
    if not any(each.closed for each in changes):
        said += [f" {label} closed none of them." if len(changes) == 1 else " No other model closed any of them."]
        return said
    said += [f" {label} closed ", many, " of them"]
    if len(order) > 1:
        alone = len(changes[order[1]].closed) < len(one.closed)
        said += [", the most of all" if alone else ", and no other more"]
    if one.unclear:
        said += [
            " (in ",
            _count(one.unclear, f"{label}: closed, with intervals that overlap"),
            " the intervals overlap)",
        ]
    if one.opened:
        said += [", and opened ", _count(one.opened, f"{label}: gaps that {first} does not have"), " more"]
    tasks = _tasks(run.models[0], run.models[best + 1])
    lost = [task for task, (value, half) in tasks.items() if value < -half]
    if not tasks:
        return [*said, "; what that cost in accuracy was not measured."]
    if not lost:
        return [*said, "; no loss of accuracy is shown."]
    title = f"{label}: tasks on which accuracy fell beyond its 95 % interval: {'; '.join(lost)}"
    both = Cell(str(len(tasks)), f"{label}: retention tasks that {first} did too")
    return [*said, "; it lost accuracy on ", Cell(str(len(lost)), title), " of ", both, f" {_many(tasks, 'task')}."]


def question(run: Evaluation, labels: Sequence[str]) -> dict[str, list[Answer]]:
    """The answers, by question."""
    return {
        "Is there a gap?": [_gap(run, labels[at], at) for at in range(len(labels))] + _chance(run),
        "Was it closed?": _closed(run, labels) + _drawn(run),
        "What did it cost?": _cost(run, labels),
    }


def _count(names: Sequence[str], title: str) -> Cell:
    return Cell(str(len(names)), title)


def _many(those: Sized, name: str) -> str:
    return name if len(those) == 1 else f"{name}s"


def _gap(run: Evaluation, label: str, at: int) -> Answer:
    model = run.models[at]
    found, of = judged(run, model), by_name(model.values)
    gaps = [name for name, gap in found.items() if gap]
    if not found:
        return Answer(at, ["unknown: no metric has a number, a floor and an interval"])
    many = Cell(str(len(found)), f"{label}: metrics that have a number, a floor and an interval")
    if not gaps:
        return Answer(at, ["no gap was found in ", many, f" {_many(found, 'metric')}; ", *_score(run, label, model)])
    abouts = {about.name: about for about in run.metrics}
    worst = max(gaps, key=lambda name: abs(of[name].ratio or math.inf))
    ratio = of[worst].ratio
    shown: Said = ["over a floor of 0"]
    if ratio is not None:
        shown = [Cell(number(ratio), titled(label, abouts[worst], of[worst], "value / floor")), " floors"]
    said: list[str | Cell] = [
        "a gap in ",
        _count(gaps, f"{label}: metrics with a gap"),
        " of ",
        many,
        f" {_many(found, 'metric')}",
    ]
    said += [f", the largest in {worst}, ", *shown, "; ", *_score(run, label, model)]
    return Answer(at, said, {"gaps": gaps})


def _score(run: Evaluation, label: str, model: Evaluated) -> Said:
    if model.score is None:
        return ["style diversity was not measured"]
    score = model.score
    said: list[str | Cell] = [
        "style diversity score ",
        Cell(number(score.value), f"{label}: style diversity score, 0 to 100, {interval(score.low, score.high)}"),
    ]
    if len(run.human_score) != 3:
        return said
    low, _, high = run.human_score
    where = "below" if score.high < low else "above" if score.low > high else "not outside"
    title = "style diversity score of human text, 0 to 100, 5 % and 95 % quantile"
    return [*said, f", {where} the human band of ", Cell(span(low, high), title)]


def _chance(run: Evaluation) -> list[Answer]:
    counts = [judged(run, model) for model in run.models]
    most = max((len(one) for one in counts), default=0)
    if not most:
        return []
    said: list[str | Cell] = ["A floor is what 95 % of human text stays within: people's own text passes about "]
    said += [Cell(f"{most / 20:.0f}", f"5 % of {most} metrics"), " of these floors by chance"]
    few = [at for at, one in enumerate(counts) if 0 < sum(one.values()) <= len(one) / 20]
    if few:
        said += [", and the gaps of ", Cell(str(len(few)), "models with no more gaps than chance gives"),
                 " of the models above are no more than that"]  # fmt: skip
    return [Answer(None, said)]


def _closed(run: Evaluation, labels: Sequence[str]) -> list[Answer]:
    if len(labels) == 1:
        return [Answer(None, ["There is one model only, so nothing can have been closed: report it together with the "
                              "one that it came from"])]  # fmt: skip
    first, found = labels[0], []
    for at in range(1, len(labels)):
        one = change(run, run.models[0], run.models[at])
        against = f"{labels[at]} against {first}: metrics"
        had = _count(one.had, f"{first}: metrics with a gap")
        if not judged(run, run.models[0]):
            said: list[str | Cell] = [f"unknown: whether {first} had a gap is"]
        elif not one.had:
            said = [f"{first} had no gap to close"]
        elif not one.closed:
            said = ["none of the ", had, f" {_many(one.had, 'gap')} of {first} was closed"]
        else:
            said = ["closed ", _count(one.closed, f"{against} whose gap was closed"), " of the ", had]
            said += [f" {_many(one.had, 'gap')} of {first}"]
        if one.unclear:
            said += ["; in ", _count(one.unclear, f"{against} closed, with intervals that overlap"), " of these the "]
            said += ["intervals of both overlap, and that they differ is not shown"]
        if one.left:
            said += ["; ", _count(one.left, f"{against} whose gap is left"), " left, of which beyond both intervals "]
            said += [_count(one.nearer, f"{against} left, smaller beyond both intervals"), " shrank and "]
            said += [_count(one.farther, f"{against} left, larger beyond both intervals"), " grew"]
        if one.opened:
            said += ["; opened ", _count(one.opened, f"{against} with a gap that the first does not have")]
        if one.unknown:
            said += ["; ", _count(one.unknown, f"{against} that cannot be judged here"), " could not be judged"]
        which = {"closed": one.closed, "closed, intervals overlap": one.unclear, "left, smaller": one.nearer,
                 "left, larger": one.farther,
                 "left, not shown to have changed": [n for n in one.left if n not in (*one.nearer, *one.farther)],
                 "opened": one.opened, "not judged": one.unknown}  # fmt: skip
        found.append(Answer(at, said, {name: names for name, names in which.items() if names}))
    return found


def _drawn(run: Evaluation) -> list[Answer]:
    ways = {(one.sampling.temperature, one.sampling.top_p, one.sampling.min_p) for one in run.models}
    steps = {json.dumps(one.drawn.get("steps"), sort_keys=True) for one in run.models}
    said = "The models were not sampled alike (see Settings): part of a difference may be the sampling's"
    other = "Not all texts were drawn with the same steps (see Settings): part of a difference may be theirs"
    return [Answer(None, [one]) for one, of in ((said, ways), (other, steps)) if len(of) > 1]


def _cost(run: Evaluation, labels: Sequence[str]) -> list[Answer]:
    first = run.models[0]
    if len(run.models) == 1:
        known = "its accuracy is below" if first.retention else "no retention task was run"
        return [Answer(None, [f"There is no other model to compare with; {known}"])]
    answers = []
    for at, (label, model) in enumerate(zip(labels, run.models, strict=True)):
        if at:
            said = [*_accuracy(labels[0], label, first, model), *_levels(run, labels[0], label, first, model)]
            answers.append(Answer(at, said))
    return answers


def accuracy_change(first: Evaluated, other: Evaluated, task: str) -> tuple[float, float] | None:
    """Points of accuracy won (lost, below 0) against the first model, and the half-width of its 95 % interval, as of
    independent questions: too wide where both answered the same ones. None where either did not."""
    was, now = ({one.task: one for one in model.retention}.get(task) for model in (first, other))
    if was is None or now is None:
        return None
    return 100 * (now.accuracy - was.accuracy), 100 * Z95 * math.hypot(was.error, now.error)


def points(label: str, first: str, task: str, found: tuple[float, float]) -> Cell:
    """A change of accuracy."""
    value, half = found
    title = f"{label} against {first}: {task}, change of accuracy, points, {interval(value - half, value + half)}"
    return Cell(f"{value:+.1f}".replace("-", "−"), title)


def _tasks(was: Evaluated, now: Evaluated) -> dict[str, tuple[float, float]]:
    tasks = {one.task: accuracy_change(was, now, one.task) for one in was.retention}
    return {task: found for task, found in tasks.items() if found is not None}


def _accuracy(first: str, label: str, was: Evaluated, now: Evaluated) -> Said:
    both = _tasks(was, now)
    if not both:
        return ["in accuracy unknown: no retention task was run on both"]
    said: list[str | Cell] = []
    for verb, sign in (("lost", -1), ("gained", 1)):
        those = {task: found for task, found in both.items() if sign * found[0] > found[1]}
        for at, (task, found) in enumerate(those.items()):
            said += [", " if at else f"{'; ' if said else ''}accuracy {verb} on ", f"{task} ("]
            said += [points(label, first, task, found), " points)"]
    same = [task for task, (value, half) in both.items() if abs(value) <= half]
    if same:
        title = f"{label}: tasks whose change of accuracy has 0 in its 95 % interval: {'; '.join(same)}"
        said += ["; on " if said else "on ", Cell(str(len(same)), title), " of "]
        said += [
            Cell(str(len(both)), f"{label}: retention tasks that {first} did too"),
            f" {_many(both, 'task')} no change",
        ]
        said += [" of accuracy is shown"]
    return said


def _levels(run: Evaluation, first: str, label: str, was: Evaluated, now: Evaluated) -> Said:
    said: list[str | Cell] = []
    old, new = by_name(was.values), by_name(now.values)
    for about in run.metrics:
        before, after = old.get(about.name), new.get(about.name)
        if about.kind != LEVEL or before is None or after is None or before.value is None or after.value is None:
            continue
        said += [f"; {about.name} from ", Cell(number(before.value), titled(first, about, before)), " to "]
        said += [Cell(number(after.value), titled(label, about, after))]
        if None in (before.low, before.high, after.low, after.high):
            said += [" (without an interval)"]
        elif _apart(before, after) == 0:
            said += [" (intervals overlap)"]
    speed = [one.cost.get("tokens per second") for one in (was, now)]
    if speed[0] is not None and speed[1] is not None:
        said += ["; tokens per second of generation from "]
        said += [Cell(number(speed[0]), f"{first}: tokens per second of generation"), " to "]
        said += [Cell(number(speed[1]), f"{label}: tokens per second of generation")]
    return said
