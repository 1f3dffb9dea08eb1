"""Known answers: what is planted in a text is found by the metrics that it concerns, and what is human is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from target_texts import document, documents

from dft_kernels.evaluation.documents import Documents
from dft_kernels.evaluation.measure import FEW, Found, measured, standing_out, style_score, swept
from dft_kernels.evaluation.metrics import METRICS, Expectation, Sample
from dft_kernels.evaluation.reading import Read, Reading

COUNT = 60
OF_TEXT = [
    metric for metric in METRICS if not isinstance(metric, Expectation) and not getattr(metric, "embedded", False)
]
QUICK = [replace(metric, halves=40) for metric in OF_TEXT]


def found(
    tokenizer: Any, planted: Callable[[str, int], str], seed: int = 0, metrics: Any = QUICK, count: int = COUNT
) -> dict[str, Found]:
    """Of texts that are human ones but for what is planted in them, in place of a model's."""
    texts = documents(3 * count, seed)
    pool = texts[: 2 * count] + [planted(text, at) for at, text in enumerate(texts[2 * count :])]
    sample = Sample(Documents(pool, np.arange(2 * count), tokenizer), np.arange(2 * count, 3 * count))
    return {one.metric.name: one for one in measured({"model": sample}, metrics=metrics, seed=seed)["model"]}


def beyond(found: dict[str, Found]) -> set[str]:
    """What lies beyond its floor, with an interval that excludes 0."""
    return {
        name
        for name, one in found.items()
        if one.value.value is not None and abs(one.value.value) > one.value.floor
        and not one.value.low <= 0 <= one.value.high
    }  # fmt: skip


def test_people_are_within_the_floor_of_people(tokenizer: Any) -> None:
    """In 95 % of draws: over 50, and all metrics, so many that chance moves the share by 1 % of it."""
    cheap = [metric for metric in QUICK if metric.name not in ("self-BLEU", "compression ratio")]
    within: dict[str, list[bool]] = {}
    for seed in range(50):
        for name, one in found(tokenizer, lambda text, _: text, seed, cheap, 30).items():
            if one.value.floor:
                within.setdefault(name, []).append(abs(one.value.value) <= one.value.floor)
    shares = {name: np.mean(those) for name, those in within.items() if len(those) == 50}
    assert len(shares) >= 17
    assert 0.92 <= np.mean(list(shares.values())) <= 0.98, shares
    assert min(shares.values()) >= 0.86, shares  # of 50 draws at 0.95, one of twenty metrics is below 0.88 by chance


def test_more_commas_are_found_by_their_rate_alone(tokenizer: Any) -> None:
    """One comma in ten is doubled in place, so that nothing else of the text changes."""

    def planted(text: str, at: int) -> str:
        generator = random.Random(at)
        words = text.split(" ")
        plain = [n for n, word in enumerate(words) if word.isalnum() and n % 2]
        for n in generator.sample(plain, max(1, round(0.1 * text.count(",") + generator.random() - 0.5))):
            words[n] += ","
        return " ".join(words)

    many = found(tokenizer, planted)
    assert "commas" in beyond(many)
    assert not {name for name in beyond(many) if name.startswith("sentence length")}


def test_a_repeated_text_is_found_by_compression_and_self_bleu(tokenizer: Any) -> None:
    same = document(random.Random(5))
    names = beyond(found(tokenizer, lambda text, at: same if at % 2 else text))
    assert {"compression ratio", "self-BLEU", "distinct-2", "token L2, 2-grams"} <= names


def test_another_vocabulary_is_found_by_token_l2(tokenizer: Any) -> None:
    """Words are exchanged one for one, so that neither lengths in words nor punctuation nor diversity change."""
    order = list(range(60))
    random.Random(0).shuffle(order)

    def planted(text: str, at: int) -> str:
        return " ".join(
            f"word{order[int(word[4:6].rstrip('.,!?'))]}" + word.lstrip("word0123456789") if word[0] == "w" else word
            for word in text.split(" ")
        )

    names = beyond(found(tokenizer, planted))
    assert "token L2, 1-grams" in names
    assert not {name for name in names if "length" in name or name in ("commas", "distinct-2", "MATTR")}


def test_few_documents_give_no_number(tokenizer: Any) -> None:
    pool = documents(3 * (FEW - 1))
    sample = Sample(Documents(pool, np.arange(2 * (FEW - 1)), tokenizer), np.arange(2 * (FEW - 1), len(pool)))
    for one in measured({"model": sample})["model"]:
        assert one.value.value is None
        assert one.value.note.startswith(("too few: ", "not measured"))


def test_texts_without_sentences_give_no_number_of_them(tokenizer: Any) -> None:
    of = found(tokenizer, lambda text, _: "word1 word2")
    assert of["sentence length, mean"].value.note.startswith("too few")
    assert of["MATTR"].value.value is None
    assert of["token L2, 1-grams"].value.value > of["token L2, 1-grams"].value.floor


def test_empty_texts_and_equal_ones_are_measured_or_said(tokenizer: Any) -> None:
    for text in ("", "\n", "…", "word1"):
        for one in found(tokenizer, lambda _, at, text=text: text).values():
            assert (one.value.value is None) == bool(one.value.note)
            assert one.value.value is None or np.isfinite([one.value.value, one.value.low, one.value.high]).all()


def test_intervals_are_of_the_size_that_texts_vary_by(tokenizer: Any) -> None:
    """Of two independent sides, 95 % of intervals hold the difference that there is in truth, 0."""
    metrics = [metric for metric in QUICK if metric.name in ("commas", "MATTR", "distinct-2")]
    held = [
        [one.value.low <= 0 <= one.value.high for one in found(tokenizer, lambda text, _: text, seed, metrics).values()]
        for seed in range(60)
    ]
    assert 0.88 <= np.mean(held) <= 1.0


def test_the_style_score_has_a_band_and_parts(tokenizer: Any) -> None:
    people, odd = (
        style_score(list(found(tokenizer, planted).values()))
        for planted in (lambda text, _: text, lambda text, _: text.replace(",", ";"))
    )
    assert people is not None
    assert odd is not None
    (score, band), (other, _) = people, odd
    assert band[0] < 52 < band[2]
    assert score.value == pytest.approx(100 * np.mean(list(score.parts.values())))
    assert score.low <= score.value <= score.high
    assert other.parts["commas"] < 0.01 < score.parts["commas"]
    assert other.value < score.value


def test_phrases_that_stand_out_are_those_planted(tokenizer: Any) -> None:
    texts = documents(3 * COUNT)
    pool = texts[: 2 * COUNT] + [f"Delve into word1. {text.replace('word2 ', 'word3 ')}" for text in texts[2 * COUNT :]]
    shown = standing_out(Documents(pool, np.arange(2 * COUNT), tokenizer), np.arange(2 * COUNT, 3 * COUNT))
    over, under = ([one for one in shown if (one.ratio > 1) == more] for more in (True, False))
    assert {"delve", "delve into", "into word1"} <= {one.phrase for one in over[:8]}
    assert "word2" in {one.phrase for one in under}
    assert all(one.low <= one.ratio <= one.high for one in shown)
    assert all((one.low > 1) or (one.high < 1) for one in shown)
    planted = next(one for one in over if one.phrase == "delve")
    assert (planted.model_count, planted.human_count) == (COUNT, 0)


def test_a_sweep_finds_the_nearer_texts(tokenizer: Any) -> None:
    texts = documents(4 * COUNT)
    pool = texts[: 3 * COUNT] + [text.replace(",", "!") for text in texts[3 * COUNT :]]
    documents_ = Documents(pool, np.arange(2 * COUNT), tokenizer)
    near, far = (Sample(documents_, np.arange(at * COUNT, (at + 1) * COUNT)) for at in (2, 3))
    floors = measured({"far": far}, metrics=QUICK)["far"]
    assert swept(floors, near)[0] < swept(floors, far)[0]
    assert swept(floors, near)[1] < swept(floors, far)[1]


def test_expectations_are_means_over_tokens(tokenizer: Any) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 40, 3 * COUNT).astype(float)
    human = Read(
        tokens[: 2 * COUNT], 3.0 * tokens[: 2 * COUNT] + generator.normal(size=2 * COUNT), 3.2 * tokens[: 2 * COUNT]
    )
    own = Read(tokens[2 * COUNT :], tokens[2 * COUNT :], 2.5 * tokens[2 * COUNT :])
    sample = Sample(Documents(documents(3 * COUNT), np.arange(2 * COUNT), tokenizer), np.arange(2 * COUNT, 3 * COUNT),
                    Reading(human, own))  # fmt: skip
    metrics = [metric for metric in METRICS if isinstance(metric, Expectation)]
    perplexity, gap, calibration = (one.value for one in measured({"model": sample}, metrics=metrics)["model"])
    assert perplexity.value == pytest.approx(np.exp(human.cross_entropy[:COUNT].sum() / tokens[:COUNT].sum()))
    assert gap.value == pytest.approx(-0.5, abs=0.02)
    assert calibration.value == pytest.approx(0.2, abs=0.02)
    assert 0 < gap.floor < 0.05


def test_a_model_without_an_entropy_gap_is_within_its_floor(tokenizer: Any) -> None:
    """Texts that are hard to read are hard to write: entropy and cross-entropy of one text go together."""
    pool = Documents(documents(3 * COUNT), np.arange(2 * COUNT), tokenizer)
    (metric,) = (metric for metric in METRICS if metric.name == "entropy gap")
    held = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        hard = 3 + 0.5 * generator.normal(size=3 * COUNT)
        sums = [20 * (hard + 0.1 * generator.normal(size=3 * COUNT)) for _ in range(2)]
        human, own = (Read(np.full(len(one[0]), 20.0), *one) for one in
                      ([part[: 2 * COUNT] for part in sums], [part[2 * COUNT :] for part in sums]))  # fmt: skip
        sample = Sample(pool, np.arange(2 * COUNT, 3 * COUNT), Reading(human, own))
        value = measured({"model": sample}, metrics=[metric], seed=seed)["model"][0].value
        held.append(abs(value.value) <= value.floor)
    assert 0.85 <= np.mean(held) <= 1.0


def test_the_scores_interval_is_about_the_score(tokenizer: Any) -> None:
    off = []
    for seed in range(6):
        made = style_score(list(found(tokenizer, lambda text, _: text, seed).values()))
        assert made is not None
        score = made[0]
        assert score.low <= score.value <= score.high
        off.append((score.low + score.high) / 2 - score.value)
    assert abs(np.mean(off)) < 3


def test_a_metric_counts_the_documents_that_it_is_taken_of(tokenizer: Any) -> None:
    of = found(tokenizer, lambda text, at: text if at < 25 else "The word1.")
    assert of["commas"].value.documents == COUNT
    assert of["sentence length, mean"].value.documents == COUNT
    assert of["MATTR"].value.value is None
    assert of["MATTR"].value.note.startswith("too few: ")


def test_what_is_rare_gives_no_number_unless_the_model_has_it(tokenizer: Any) -> None:
    rare = found(tokenizer, lambda text, at: text.replace(",", ";", at < 5))
    assert rare["semicolons"].value.note == "too few: 5 in all texts of both sides, of 30 that a floor takes"
    often = found(tokenizer, lambda text, at: text.replace(",", ";", 1))
    assert often["semicolons"].value.value > often["semicolons"].value.floor


def test_text_without_spaces_has_no_metrics_of_words(tokenizer: Any) -> None:
    texts = ["这是一个句子。那是另一个句子，很长。" * 4] * (3 * COUNT)
    sample = Sample(Documents(texts, np.arange(2 * COUNT), tokenizer), np.arange(2 * COUNT, 3 * COUNT))
    for one in measured({"model": sample}, metrics=QUICK)["model"]:
        assert (one.value.note == "not measured: no spaces separate the words") == one.metric.words


def test_a_sentence_that_began_in_the_prompt_is_left_out(tokenizer: Any) -> None:
    texts = ["sat far. It was late. The cat"] * 2
    pool = Documents(texts, np.arange(2), tokenizer, prompts=["The dog", "The dog ran."])
    assert [[len(one) for one in sentences] for sentences in pool.sentences] == [[3], [2, 3]]
