"""Every metric of the table: what it says of itself, and its value beside a second implementation's."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import sacrebleu
from lexicalrichness import LexicalRichness
from scipy.stats import wasserstein_distance
from target_texts import documents

from dft_kernels.evaluation.documents import Documents
from dft_kernels.evaluation.metrics import METRICS, Distance, Expectation, Metric, Statistic
from dft_kernels.evaluation.results import DIFFERENCE, DISTANCE, LEVEL, About
from dft_kernels.targets.corpus import WORD
from dft_kernels.targets.punctuation import CLASSES, marks

A, B = np.arange(0, 12), np.arange(12, 30)
BY_NAME = {metric.name: metric for metric in METRICS}


@pytest.fixture(scope="module")
def pool(tokenizer: Any) -> Documents:
    texts = [*documents(28), "Nothing ends here", "“Word1!” word2 — word3; word4: word5... word6"]
    return Documents(texts, np.arange(30), tokenizer)


def words(pool: Documents, row: int) -> list[str]:
    return [match.group().lower() for match in WORD.finditer(pool.texts[row])]


def lengths(pool: Documents, rows: Any) -> list[int]:
    """Words of the sentences that end, which in these texts a full stop, ! or ? does."""
    out = []
    for row in rows:
        held = 0
        for piece in pool.texts[row].replace("!", ".").replace("?", ".").split(".")[:-1]:
            held = len(WORD.findall(piece))
            out += [held] if held else []
    return out


def gaps(pool: Documents, rows: Any) -> list[int]:
    out = []
    for row in rows:
        text, held, began = pool.texts[row], 0, False
        for token in text.replace(",", " , ").replace(".", " . ").replace("!", " ! ").replace("?", " ? ").split():
            if token in ",.!?":
                out += [held] if began else []
                held, began = 0, True
            else:
                held += 1
    return out


def grams(rows: list[list[Any]], n: int) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(row[at : at + n]) for row in rows for at in range(len(row) - n + 1))


def second(name: str, pool: Documents, a: Any, b: Any) -> float:
    """A metric's value, from its formula alone: of a, or between a and b."""
    listed = [words(pool, row) for row in a]
    if name.startswith("token L2"):
        ids = [[pool.tokenizer(pool.texts[row])["input_ids"] for row in rows] for rows in (a, b)]
        sides = [grams(side, int(name[10])) for side in ids]
        shares = [{key: n / sum(side.values()) for key, n in side.items()} for side in sides]
        return math.dist(*([share.get(key, 0) for key in {**sides[0], **sides[1]}] for share in shares))
    if name.startswith("distinct"):
        found = grams(listed, int(name[-1]))
        return len(found) / sum(found.values())
    if name in ("MATTR", "MTLD"):
        each = [LexicalRichness(one, preprocessor=None, tokenizer=None) for one in listed if len(one) >= 50]
        return float(np.mean([one.mattr(50) if name == "MATTR" else one.mtld() for one in each]))
    if name == "self-BLEU":
        texts = [" ".join(one) for one in listed]
        others = [[text for j, text in enumerate(texts) if j != i] for i in range(len(texts))]
        made = [sacrebleu.sentence_bleu(t, o, tokenize="none").score for t, o in zip(texts, others, strict=True)]
        return float(np.mean(made))
    if name == "compression ratio":
        data = "\n".join(pool.texts[row] for row in a).encode()
        return len(data) / len(zlib.compress(data, 9))
    if name == "sentence length, mean":
        return float(np.mean(lengths(pool, a)))
    if name == "sentence length, SD":
        return float(np.std(lengths(pool, a)))
    if name == "burstiness":
        mean, deviation = np.mean(lengths(pool, a)), np.std(lengths(pool, a))
        return float((deviation - mean) / (deviation + mean))
    if name == "sentence length, W1":
        return float(wasserstein_distance(lengths(pool, a), lengths(pool, b)))
    if name == "text length":
        return float(np.mean([len(one) for one in listed]))
    if name == "repeated openings":
        return 1.0  # each sentence of these texts begins with The
    if name == "punctuation rates, L1":
        totals = [sum(len(words(pool, row)) for row in rows) for rows in (a, b)]
        sides = [Counter(mark for row in rows for mark in marks(pool.texts[row])) for rows in (a, b)]
        return 1000 * sum(abs(sides[0][k] / totals[0] - sides[1][k] / totals[1]) for k in {**sides[0], **sides[1]})
    if name == "punctuation gaps, W1":
        return float(wasserstein_distance(gaps(pool, a), gaps(pool, b)))
    if name == "punctuation transitions, TV":
        sides = [grams([marks(pool.texts[row]) for row in rows], 2) for rows in (a, b)]
        totals = [sum(side.values()) for side in sides]
        keys = {**sides[0], **sides[1]}
        return sum(abs(sides[0][key] / totals[0] - sides[1][key] / totals[1]) for key in keys) / 2
    kind = next(kind for kind in CLASSES if name.replace(" ", "_").startswith(kind))
    return 1000 * sum(marks(pool.texts[row]).count(CLASSES.index(kind)) for row in a) / sum(map(len, listed))


@pytest.mark.parametrize(
    "name", [m.name for m in METRICS if not isinstance(m, Expectation) and not getattr(m, "embedded", False)]
)
def test_values_are_a_second_implementations(name: str, pool: Documents) -> None:
    metric = BY_NAME[name]
    a, b = (A, B) if metric.kind == DISTANCE else (A, A)
    b = b[b < 28] if "W1" in name else b  # of the last two, sentences are no matter of full stops alone
    got = metric.of(pool, a, b) if isinstance(metric, Distance) else metric.of(pool, a)
    kind = {"dashes": "dash", "quotation marks": "quote"}.get(name, name)
    assert got == pytest.approx(second(kind, pool, a, b), abs=1e-9, rel=1e-9)


def test_the_table_says_what_each_is() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert all(getattr(metric, field.name) for field in fields(About)), metric.name
        assert metric.kind in (DIFFERENCE, DISTANCE, LEVEL)
        assert isinstance(metric, Distance) == (metric.kind == DISTANCE)
        assert not metric.style or isinstance(metric, Statistic)
    assert len({metric.group for metric in METRICS}) == 6


def test_every_mark_has_its_rate(pool: Documents) -> None:
    """Each class's own, of a text that holds one of each."""
    names = ("colons", "dashes", "exclamation marks", "full stops", "quotation marks", "semicolons")
    values = [BY_NAME[name].of(pool, np.array([29])) for name in names]  # type: ignore[attr-defined]
    quotes, rest = values.pop(4), values
    assert rest == pytest.approx([1000 / 6] * 5)
    assert quotes == pytest.approx(2000 / 6)


def test_a_sentence_that_the_text_cuts_off_is_none(pool: Documents) -> None:
    assert pool.sentences[28] == []
    whole = Documents(["It was late. The cat", "It was late.", "Was it late?” "], np.arange(3), pool.tokenizer)
    assert [len(one) for one in whole.sentences] == [1, 1, 1]


def test_the_base_metric_refuses_to_be_one(pool: Documents) -> None:
    bare = Metric("a", "b", DISTANCE, "c", "d", "e")
    with pytest.raises(NotImplementedError):
        bare.at(None, A)  # type: ignore[arg-type]
