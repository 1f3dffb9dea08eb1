"""One page of everything that runs of `dft-kernels evaluate` found, which asks nothing of anywhere: no script, no file
beside it, no request. What stands in the runs' files is text on it, whatever it looks like."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import fail
from . import figures, findings
from .results import DIFFERENCE, LEVEL, About, Evaluated, Evaluation, Phrase, Slice, Swept, Text, together
from .svg import key
from .wording import MISSING, Z95, Cell, by_name, cleaned, interval, labels, number, span, titled

TEXTS, PHRASES = 10, 10  # texts that are shown, and words and phrases before the fold
_SAMPLING = ("temperature", "top_p", "min_p", "seed", "length", "count")
_COSTS = {"peak memory bytes": (2**20, "peak memory, MiB"), "parameters": (1e6, "parameters, millions")}


def page(runs: Sequence[Evaluation]) -> str:
    """The HTML of runs that were held against the same human text; the first model is where the others started.

    ValueError where runs do not belong together, or one has no model, or values of metrics that it does not describe.
    Cost: four models by forty metrics take 2 s and 1 MB. Needs jinja2 and matplotlib."""
    import jinja2

    runs = [cleaned(run) for run in runs]
    every = {about.name: about for one in reversed(runs) for about in one.metrics}
    abouts = [every[name] for name in dict.fromkeys(about.name for one in runs for about in one.metrics)]
    run = replace(together(runs), metrics=abouts)
    known = {about.name for about in run.metrics}
    for name in (value.metric for model in run.models for value in model.values):
        if name not in known:
            fail("report", "run", "describe its metrics", f"{name!r} without a description", "Evaluate it again")
    if not run.models:
        fail("report", "run", "hold a model", "none", "Evaluate one")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, span=span)
    return environment.get_template("report.html").render(_shown(run, runs))


def _shown(run: Evaluation, runs: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything that the template prints."""
    names = labels(run.models)
    compared = [about for about in run.metrics if about.kind != LEVEL]
    groups: dict[str, list[About]] = {}
    for about in compared:
        if all(figures.hidden(by_name(model.values).get(about.name)) for model in run.models):
            continue  # named below the forest
        groups.setdefault(about.group, []).append(about)
    to = figures.scale(run, compared)
    return {
        "run": run,
        "labels": names,
        "keys": [key(at) for at in range(len(names))],
        "lead": findings.lead(run, names),
        "question": findings.question(run, names),
        "forest": [
            (group, *(figures.forest(run, names, abouts, to, f"forest{at}-{n}", narrow=bool(n)) for n in (0, 1)))
            for at, (group, abouts) in enumerate(groups.items())
        ],
        "edge": f"{figures.MOST:,}" if figures.MOST in (-to.low, to.high) else "",
        "left_out": figures.left_out(run, compared, names),
        "score": [figures.score(run, names, f"score{n}", narrow=bool(n)) for n in (0, 1)]
        if any(model.score for model in run.models)
        else [],
        "parts": _parts(run, names),
        "distributions": {
            what: made
            for at, what in enumerate(run.human_histograms)
            if (made := figures.distributions(run, names, what, f"shares{at}"))
        },
        "phrases": [_phrases(label, model) for label, model in zip(names, run.models, strict=True)],
        "texts": _texts(run),
        "retention": _retention(run, names),
        "levels": [about for about in run.metrics if about.kind == LEVEL],
        "costs": _costs(run, names),
        "slices": _slices(run, names),
        "metrics": [(about, _rows(run, names, about)) for about in run.metrics],
        "settings": _settings(runs),
        "sampling": [
            [Cell(f"{getattr(model.sampling, one):g}", f"{label}: {one.replace('_', '-')} of its sampling")
             for one in _SAMPLING]
            for label, model in zip(names, run.models, strict=True)
        ],
        "sweeps": [
            (label, [_swept(label, one) for one in model.sweep])
            for label, model in zip(names, run.models, strict=True)
            if model.sweep
        ],
        "FOLD": PHRASES,
    }  # fmt: skip


def _swept(label: str, one: Swept) -> list[Cell]:
    """A way of sampling that was tried."""
    how = one.sampling
    said = f"{label}: tried at temperature {how.temperature:g}, top-p {how.top_p:g}, min-p {how.min_p:g}"
    return [
        *(Cell(f"{getattr(how, name):g}", f"{said}: {name}") for name in ("temperature", "top_p", "min_p")),
        Cell(number(one.distance), f"{said}: mean of |value| / floor over the metrics of texts"),
        Cell(str(one.gaps), f"{said}: metrics beyond their floor"),
    ]


def _rows(run: Evaluation, names: Sequence[str], about: About) -> list[dict[str, Any]]:
    """A metric's line of the table, for every model."""
    found = []
    for at, (label, model) in enumerate(zip(names, run.models, strict=True)):
        value = by_name(model.values).get(about.name)
        if value is None or value.value is None:
            why = "not in its run" if value is None else value.note or "not measured"
            found.append({"at": at, "why": why, "cells": [], "note": "", "gap": False})
            continue
        shown = {
            "": number(value.value, sign=about.kind == DIFFERENCE),
            "95 % interval": span(value.low, value.high),
            "human floor": number(value.floor),
            "value / floor": number(value.ratio),
            "the model's own statistic": number(value.model),
            "the human statistic": number(value.human),
            "p of a permutation test": number(value.p),
            "number of documents": f"{value.documents:,}",
        }
        cells = [Cell(text, titled(label, about, value, what)) for what, text in shown.items()]
        gap = bool(findings.has_gap(value))
        found.append({"at": at, "why": "", "cells": cells, "note": value.note, "gap": gap})
    return found


def _parts(run: Evaluation, names: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    """The parts of the scores, by metric."""
    metrics = dict.fromkeys(name for model in run.models if model.score for name in model.score.parts)
    found = []
    for name in metrics:
        line = []
        for label, model in zip(names, run.models, strict=True):
            part = model.score.parts.get(name) if model.score else None
            title = f"{label}: part of the style diversity score from {name}, 0 to 1"
            line.append(Cell(number(part), title, part))
        found.append((name, line))
    return found


# ---- words, and texts


def _phrases(label: str, model: Evaluated) -> dict[str, list[tuple[str, list[Cell]]]]:
    """Over- and under-used, the most extreme first."""

    def line(one: Phrase) -> tuple[str, list[Cell]]:
        said = f"{label}: {one.phrase!r}, "
        ratio = f"{said}share in the model's text / in human text, {interval(one.low, one.high)}"
        return one.phrase, [
            Cell(number(one.ratio), ratio),
            Cell(span(one.low, one.high), ratio),
            Cell(f"{one.model_count:,}", f"{said}count in the model's text"),
            Cell(f"{one.human_count:,}", f"{said}count in human text"),
        ]

    over = sorted((one for one in model.phrases if one.ratio > 1), key=lambda one: -one.ratio)
    under = sorted((one for one in model.phrases if one.ratio <= 1), key=lambda one: one.ratio)
    return {"more": [line(one) for one in over], "less": [line(one) for one in under]}


def marked(text: str, phrases: Sequence[Phrase]) -> list[tuple[str, Phrase | None]]:
    """A text in pieces, of which those that are an over-used phrase come with it: whole words, in any case, whatever
    white space is between them. Over-used: the interval of its ratio lies above 1."""
    over = {" ".join(one.phrase.lower().split()): one for one in phrases if one.low > 1 and one.phrase.strip()}
    if not over:
        return [(text, None)]
    every = []
    for phrase in sorted(over, key=len, reverse=True):
        words = r"\s+".join(map(re.escape, phrase.split()))
        start, end = (r"(?<!\w)" if re.match(r"\w", phrase) else ""), (r"(?!\w)" if re.search(r"\w$", phrase) else "")
        every.append(f"{start}{words}{end}")
    pieces: list[tuple[str, Phrase | None]] = []
    for at, piece in enumerate(re.split(f"({'|'.join(every)})", text, flags=re.IGNORECASE)):
        if piece:
            pieces.append((piece, over.get(" ".join(piece.lower().split())) if at % 2 else None))
    return pieces


def _texts(run: Evaluation) -> list[dict[str, Any]]:
    """The first texts, of every model that has the prompt."""
    first = list(dict.fromkeys((text.prompt, text.human) for model in run.models for text in model.texts))[:TEXTS]
    of: list[Mapping[tuple[str, str], Text]] = [
        {(text.prompt, text.human): text for text in reversed(model.texts)} for model in run.models
    ]
    found = []
    for prompt, human in first:
        written = []
        for model, texts in zip(run.models, of, strict=True):
            text = texts.get((prompt, human))
            written.append(None if text is None else marked(text.model, model.phrases))
        found.append({"prompt": prompt, "human": human, "models": written})
    return found


# ---- costs, slices, settings


def _retention(run: Evaluation, names: Sequence[str]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Per task what each model got right."""
    found = []
    for task in dict.fromkeys(one.task for model in run.models for one in model.retention):
        line: list[dict[str, Any] | None] = []
        for at, (label, model) in enumerate(zip(names, run.models, strict=True)):
            one = {each.task: each for each in model.retention}.get(task)
            if one is None:
                line.append(None)
                continue
            half = Z95 * one.error
            low, high = 100 * max(0.0, one.accuracy - half), 100 * min(1.0, one.accuracy + half)
            changed = findings.accuracy_change(run.models[0], model, task) if at else None
            said = f"{label}: {task}, accuracy, %, {interval(low, high)}, {one.questions:,} of {one.of:,} questions"
            share = None if one.normalised is None else 100 * one.normalised
            line.append({
                "accuracy": Cell(number(100 * one.accuracy), said),
                "interval": Cell(span(low, high), said),
                "normalised": Cell(number(share), f"{label}: {task}, accuracy by length-normalised likelihood, %"),
                "change": findings.points(label, names[0], task, changed) if changed else None,
                "questions": Cell(f"{one.questions:,} of {one.of:,}", f"{label}: {task}, questions asked"),
            })  # fmt: skip
        found.append((task, line))
    return found


def _costs(run: Evaluation, names: Sequence[str]) -> list[tuple[str, list[Cell]]]:
    """What generation took, by what is known of it."""
    found = []
    for name in dict.fromkeys(name for model in run.models for name in model.cost):
        unit, said = _COSTS.get(name, (1.0, name))
        cells = []
        for label, model in zip(names, run.models, strict=True):
            value = model.cost.get(name)
            cells.append(Cell(number(None if value is None else value / unit), f"{label}: {said}"))
        found.append((said, cells))
    return found


def _slices(run: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Pair by pair, what differs by whose doing, and what does not."""
    pairs = dict.fromkeys((one.first, one.second) for model in run.models for one in model.slices)

    def line(at: int, one: Slice) -> dict[str, Any]:
        said = f"{names[at]}: {one.metric}, {one.first} less {one.second}"
        many = " and ".join(f"{count:,}" for count in one.documents) or MISSING
        mine = f"{said}, {interval(one.model_low, one.model_high)}"
        theirs = f"human text: {one.metric}, {one.first} less {one.second}, {interval(one.human_low, one.human_high)}"
        return {"at": at, "metric": one.metric, "cells": [
            Cell(number(one.model, sign=True), mine), Cell(span(one.model_low, one.model_high, True), mine),
            Cell(number(one.human, sign=True), theirs), Cell(span(one.human_low, one.human_high, True), theirs),
            Cell(many, f"{said}, documents of each"),
        ]}  # fmt: skip

    found = []
    for first, second in pairs:
        by: dict[str, list[dict[str, Any]]] = {"model": [], "target": [], "": []}
        for at, model in enumerate(run.models):
            for one in model.slices:
                if (one.first, one.second) == (first, second):
                    by.setdefault(one.whose, by[""]).append(line(at, one))
        found.append({"first": first, "second": second, "by": by})
    return found


def _settings(runs: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """Every setting and version, one value where all runs agree."""

    def flat(name: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {k: v for key, one in value.items() for k, v in flat(f"{name}.{key}", one).items()}
        return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}

    tables = []
    for run in runs:
        table = {"version of dft-kernels": run.version, "date": run.date}
        for name, value in run.settings.items():
            table |= flat(name, value)
        for model in run.models:
            if engine := model.drawn.get("engine"):
                table[f"engine of {model.name}"] = f"{engine} {model.drawn['versions'].get(engine, '')}".rstrip()
            if own := model.drawn.get("generation"):
                table |= flat(f"generation_config of {model.name}", own)
            if steps := model.drawn.get("steps"):
                table[f"steps of {model.name}"] = json.dumps(steps, ensure_ascii=False)
        tables.append(table)
    found = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, MISSING) for table in tables]
        found.append((name, values[:1] if len(set(values)) == 1 else values))
    return found
