"""Distances of a growing text: numbers that mean something, or why there are none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dft_kernels.play.distances import ROWS, Ruler, counted
from dft_kernels.store.fingerprint import tokenizer_fingerprint
from dft_kernels.targets.comparison import compare
from dft_kernels.targets.distances import l2, sampling_floor, wasserstein_1
from dft_kernels.targets.target import Target

TEXT = "and ran. The cat sat far, and late. It was! The dog ran and ran. The cat sat; it was late and far. The dog"


@pytest.fixture
def ruler(target: Target, tokenizer: Any) -> Ruler:
    return Ruler(target, tokenizer_fingerprint(tokenizer))


def row(name: str) -> Any:
    (found,) = [one for one in ROWS if one.name == name]
    return found


def test_statistics_by_hand() -> None:
    counts, found = counted("The dog sat", TEXT, [3, 4, 4], 9)
    assert counts == {"sentences": 4, "words": 25, "tokens": 3}  # neither the first nor the last is whole
    lengths = found["sentence_words"]
    assert lengths.nonzero().flatten().tolist() == [2, 5, 6, 8]
    assert float(lengths.sum()) == 1
    assert counted("The dog sat.", TEXT, [3])[0]["sentences"] == 5
    assert found["unigram"].tolist() == [0, 0, 0, 1 / 3, 2 / 3, 0, 0, 0, 0]
    letters = [len(word.strip(",.;!")) for word in TEXT.split()]
    assert torch.allclose(found["word_length"], torch.from_numpy(np.bincount(letters, minlength=25) / 25))
    marks = found["punctuation_per_1000_words"]
    assert marks[[0, 1, 4, 6]].tolist() == pytest.approx([1000 * n / 25 for n in (1, 1, 4, 1)])
    assert "type_token_ratio" not in found


@pytest.mark.parametrize("text", ["", " ", ".", "\n\n", "word", TEXT[:60], "😀" * 30])
def test_a_short_text_has_no_number(ruler: Ruler, text: str) -> None:
    for one in ruler("The", text, [3] * 20):
        assert one.value is one.floor is one.ratio is None
        assert one.why.startswith("too few ")


def test_each_number_comes_with_what_it_takes(ruler: Ruler, target: Target) -> None:
    text = " ".join(["The cat sat far, and late. It was late!"] * 13)
    found = dict(zip((one.name for one in ROWS), ruler("The end.", text, [3] * 58), strict=True))
    for name, one in found.items():
        assert one.why == "", name
        assert one.ratio == pytest.approx(one.value / one.floor)
    assert found["sentence_words, W1"].value == pytest.approx(
        wasserstein_1(counted("The end.", text, [3])[1]["sentence_words"], target["sentence_words"])
    )
    share = torch.zeros(len(target["unigram"]))
    share[3] = 1
    assert found["unigram, L2"].value == pytest.approx(l2(share, target["unigram"]))
    assert found["unigram, L2"].floor == pytest.approx(sampling_floor(target["unigram"], 55, target.about.tokens))
    nine = "The cat sat far. " * 9
    by_label = {one.label: one for one in ruler("", nine, [])}
    assert by_label["burstiness of sentence lengths"].why == "too few sentences: 9 of 10"
    assert by_label["token frequencies, L2"].why == "too few tokens: 0 of 50"
    assert by_label["marks per 1,000 words"].why == "too few words: 36 of 50"


@pytest.mark.parametrize(
    ("name", "statistic"), [("sentence_words, W1", "sentence_words"), ("word_length, W1", "word_length")]
)
def test_a_floor_is_what_texts_of_the_target_are_off_by(
    ruler: Ruler, target: Target, name: str, statistic: str
) -> None:
    generator, p, count = np.random.default_rng(7), target[statistic].double().numpy(), 60
    drawn = torch.from_numpy(generator.multinomial(count, p / p.sum(), 400) / count)
    values = [compare({statistic: one}, {statistic: target[statistic]})[name] for one in drawn]
    assert ruler.floor(row(name), count) == pytest.approx(np.mean(values), rel=0.15)
    assert ruler.floor(row(name), 16 * count) == pytest.approx(np.mean(values) / 4, rel=0.2)


def test_the_floor_of_a_mean_is_scaled_from_halves_of_the_corpus(ruler: Ruler, target: Target) -> None:
    words, noise = target.about.words, target.noise["type_token_ratio, L1"]
    one = row("type_token_ratio, L1")
    assert ruler.floor(one, words // 100) == pytest.approx(noise * math.sqrt(101 / 4), rel=0.02)
    assert ruler.floor(one, words) == pytest.approx(noise / math.sqrt(2))


def test_a_growing_text_asks_for_few_floors(ruler: Ruler) -> None:
    for count in range(1, 120):
        ruler("", "The cat sat. " * count, [3] * count)
    assert ruler.floor.cache_info().misses < 150


def test_a_target_of_other_tokens_or_with_less(target: Target) -> None:
    text = " ".join(["The cat sat far, and late. It was late!"] * 13)
    other = Ruler(target, "another")("", text, [3] * 60)
    assert [one.why for one in other] == ["", "", "", "", "", "the target has other tokens"]
    less = replace(target, tensors={"unigram": target["unigram"]})
    found = Ruler(less, str(target.about.tokenizer_sha256))("", text, [3] * 60)
    assert [one.why for one in found] == ["not in the target"] * 5 + [""]
