"""Statistics of a corpus: each against a count by hand, streaming, noise floors, and distances between two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from target_texts import WORDS, documents
from tiny_models import word_tokenizer

from dft_kernels.targets import corpus, distances, ngrams
from dft_kernels.targets.comparison import between, compare
from dft_kernels.targets.punctuation import CLASSES, marks

COMMA, STOP, EXCLAMATION, QUOTE = (CLASSES.index(name) for name in ("comma", "full_stop", "exclamation", "quote"))
TEXT = "The cat sat. The cat, the dog and the cat ran far!\n\nIt was late. The cat sat."
#       0   1   2  3 | 4  5 6  7   8   9  10  11  12  13 14 | 15 16  17  18 | 19 ..


def test_every_statistic_by_hand(tokenizer: Any) -> None:
    target = corpus.build([TEXT], tokenizer, name="hand")
    about = target.about
    assert (about.documents, about.characters, about.words, about.sentences, about.tokens) == (1, len(TEXT), 18, 4, 23)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    word = WORDS.index
    counts = {w: ids.count(word(w)) for w in ("The", "cat", "the", ".", "!", ",", "far")}
    assert counts == {"The": 3, "cat": 4, "the": 2, ".": 3, "!": 1, ",": 1, "far": 1}
    for one, count in counts.items():
        assert float(target["unigram"][word(one)]) == pytest.approx(count / 23)
    assert target["sentence_end"].nonzero().flatten().tolist() == [word("."), word("!")]
    assert target["sentence_end"].sum() == 2
    lengths = {4: 3, 11: 1}  # tokens of the four sentences
    assert target["sentence_tokens"].nonzero().flatten().tolist() == [3, 10]
    assert target["sentence_tokens"][[3, 10]].tolist() == [0.75, 0.25]
    assert target["hazard"][[3, 10]].tolist() == [0.75, 1.0]
    assert float(target["hazard"].sum()) == 1.75
    assert sum(a * b for a, b in lengths.items()) == 23
    assert torch.equal(
        target["soft_hazard"], target["hazard"]
    )  # of . and ! alone, which end a sentence wherever they are
    assert target["sentence_words"][[3, 9]].tolist() == [0.75, 0.25]
    mean, deviation = 4.5, math.sqrt(0.75 * 1.5**2 + 0.25 * 4.5**2)
    assert target.burstiness == pytest.approx((deviation - mean) / (deviation + mean))
    assert target["word_length"][[2, 3, 4]].tolist() == pytest.approx([1 / 18, 16 / 18, 1 / 18])
    per_1000 = target["punctuation_per_1000_words"]
    assert per_1000[[COMMA, STOP, EXCLAMATION, CLASSES.index("newline")]].tolist() == pytest.approx(
        [1000 / 18, 3000 / 18, 1000 / 18, 1000 / 18]
    )
    assert target["punctuation_rate"][[COMMA, STOP, EXCLAMATION]].tolist() == pytest.approx([1 / 23, 3 / 23, 1 / 23])
    assert target["punctuation_features"].tolist() == [
        [word("."), STOP], [word(","), COMMA], [word("!"), EXCLAMATION], [word("?"), CLASSES.index("question")],
        [word('."'), STOP], [word('."'), QUOTE],
    ]  # fmt: skip
    assert target["punctuation_gap"][STOP].nonzero().flatten().tolist() == [3, 14]  # 4 and 15 tokens apart
    assert target["punctuation_gap"][STOP][3] == 0.5
    transition = target["punctuation_transition"]  # . , ! . .
    assert transition[STOP].tolist() == [0.5 if k in (STOP, COMMA) else 0 for k in range(len(CLASSES))]
    assert transition[COMMA, EXCLAMATION] == transition[EXCLAMATION, STOP] == 1
    assert "type_token_ratio" not in target
    assert "entropy" not in target
    assert "ngram_starts" not in target
    with pytest.raises(ValueError, match=r"Target: hand: entropy must be there, got none. entropy: absent, no token"):
        target["entropy"]
    assert any(text.startswith("noise: 1 passages") for text in target.warnings)
    assert any(text.startswith("sentence_words: 4 sentences") for text in target.warnings)
    assert target.noise == {}


def test_the_soft_hazard_counts_every_full_stop(tokenizer: Any) -> None:
    """Of three full stops two end a sentence: each is two thirds of an end, that behind Mr at age 1 too."""
    words = word_tokenizer([*WORDS, "Mr"])
    target = corpus.build(["Mr. cat sat. The dog ran."], words, name="t")
    assert target["hazard"].nonzero().flatten().tolist() == [3, 4]
    assert target["soft_hazard"][[1, 3, 4]].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert target["soft_hazard"].count_nonzero() == 3


def test_ngrams_and_entropy_by_hand(tokenizer: Any) -> None:
    ids = [np.array([3, 4, 5, 3, 4, 6]), np.array([3, 4, 5])]
    counters = [ngrams.NGramCounts(size, 100) for size in (2, 3)]
    for counter in counters:
        for block, one in enumerate(ids):
            counter.add(one, block)
    found = ngrams.tracked(counters, seen=2)
    assert found is not None
    tensors = found.tensors(slice(None))
    assert tensors["ngram_contexts"].tolist() == [[-1, 3], [-1, 4], [3, 4]]
    assert tensors["ngram_starts"].tolist() == [0, 1, 2, 3]
    assert tensors["ngram_completions"].tolist() == [4, 5, 5]
    assert tensors["ngram_probability"].tolist() == pytest.approx([1, 2 / 3, 2 / 3])
    assert tensors["ngram_context_probability"].tolist() == pytest.approx([3 / 7, 3 / 7, 3 / 5])
    assert found.tensors([1])["ngram_probability"].tolist() == [1, 1, 1]
    entropy = ngrams.entropies(counters[0], least=2, bias=1.0)
    assert entropy is not None
    assert entropy["entropy_contexts"].tolist() == [3, 4]
    h = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) + 1 / 6
    assert entropy["entropy"].tolist() == pytest.approx([0, h])
    assert entropy["entropy_weight"].tolist() == pytest.approx([0.5, 0.5])
    pruned = ngrams.NGramCounts(2, 100, limit=2)
    for block, one in enumerate(ids):
        pruned.add(one, block)
    pruned.counts()
    assert pruned.dropped == 5  # all by block seen once
    with pytest.raises(ValueError, match="3-grams of a tokenizer must fit 63 bits"):
        ngrams.NGramCounts(3, 1 << 20)


def test_the_correction_removes_most_of_the_entropys_bias() -> None:
    """Uniform over 20: the plug-in estimate of 100 draws is low by about 19 / 200, the corrected one by far less."""
    generator, off = np.random.default_rng(0), []
    for _ in range(50):
        counter = ngrams.NGramCounts(2, 32)
        counter.add(np.stack([np.full(100, 31), generator.integers(0, 20, 100)], 1).reshape(-1), 0)
        found = ngrams.entropies(counter, least=90, bias=0.2)
        assert found is not None
        off.append(float(found["entropy"][found["entropy_contexts"] == 31]) - math.log(20))
    assert abs(float(np.mean(off))) < 0.015


def test_windows_of_words() -> None:
    words = [f"w{n % 40}" for n in range(70)]
    window, rows = corpus.WINDOW, range(70 - corpus.WINDOW + 1)
    assert corpus._moving_types(words) == (sum(len(set(words[at : at + window])) for at in rows), len(rows))
    assert corpus._moving_types(words[:10]) == (0, 0)


def test_marks() -> None:
    kinds = [CLASSES[kind] for kind in marks('Well-known "it\'s" -- 3,5... (no)\n\nYes—so; why?! a: b\n')]
    assert kinds == [
        "quote", "quote", "dash", "comma", "full_stop", "other", "other", "newline", "dash", "semicolon", "question",
        "exclamation", "colon", "newline",
    ]  # fmt: skip


def test_passages_and_sentences() -> None:
    lines = ["a line\n"] * 5 + ["\n"] + ["more\n"] * 3
    assert list(corpus.passages(iter(lines), 20)) == ["a line\n" * 5 + "\n", "more\n" * 3]
    assert list(corpus.passages(["x" * 30 + "\n"] * 4, 10)) == ["x" * 30 + "\n" + "x" * 30 + "\n"] * 2
    text = 'CHAPTER I\n\nMr. Bennet came. "Go!" \n * * * \n\n\nLast'
    assert [text[end - 4 : end] for end in corpus.sentence_ends(text)] == ["ER I", "ame.", "* * *"[-4:], "Last"]


def test_streamed_in_parts_is_all_at_once(tokenizer: Any) -> None:
    texts = documents(40)
    whole, parts = corpus.Counts(tokenizer), [corpus.Counts(tokenizer) for _ in range(3)]
    for number, text in enumerate(texts):
        whole.add(text, number % 16)
        parts[number % 3].add(text, number % 16)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    one, other = (counts.target("t", "", "") for counts in (whole, parts[0]))
    assert one.about == other.about
    assert one.noise == other.noise
    assert list(one) == list(other)
    assert "ngram_starts" in one
    assert "entropy" in one
    for name in one:
        assert torch.equal(one[name], other[name])


def test_the_squared_noise_floor_falls_with_the_corpus(tokenizer: Any) -> None:
    squares = []
    for count in (100, 800):
        target = corpus.build(documents(count), tokenizer, name="t")
        squares.append({name: value**2 for name, value in target.noise.items()})
        tokens = target.about.tokens
        assert tokens is not None
        floor = distances.sampling_floor(target["unigram"], tokens / 2, tokens / 2)
        assert 0.7 < target.noise["unigram, L2"] / floor < 1.2  # independent words, but for one The, comma and end each
    for name in ("unigram, L2", "bigram, L2", "sentence_words, W1", "punctuation_rate, L1"):
        assert 4 < squares[0][name] / squares[1][name] < 16, name  # 8


def test_distances() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert distances.l2(p, q) == pytest.approx(math.sqrt(0.375))
    assert distances.total_variation(p, q) == 0.5
    assert distances.kl(p, q) == pytest.approx(math.log(2))
    assert distances.kl(q, p) == math.inf
    assert distances.wasserstein_1(p, q) == 0.75
    assert distances.cramer(p, q) == 0.25**2 + 0.5**2
    weights = [2.0, 0.5 + 0.75, 0.25 + 0.75 * 0.75]
    assert distances.hazard(p, q) == pytest.approx(
        (0.25 * weights[0] + 0.25 * weights[1] + 0.5 * weights[2]) / sum(weights)
    )
    assert distances.sampling_floor(p, 10, 40) == pytest.approx(math.sqrt(0.5 * 0.125))
    with pytest.raises(ValueError, match=r"l2: q must have the shape of p, \[3\], got \[2\]"):
        distances.l2(p, q[:2])


def test_compare(tokenizer: Any) -> None:
    a, b = (corpus.build(documents(40, seed), tokenizer, name="t") for seed in (0, 1))
    found = compare(a.tensors, b.tensors)
    assert set(found) == set(a.noise)
    assert all(value > 0 for value in found.values())
    assert all(value == 0 for value in compare(a.tensors, a.tensors).values())
    text = corpus.build(documents(40), name="t")
    assert set(between(a, text)) == {name for name in found if name.split(",")[0] in (*text, "burstiness")}
    assert text.vocab_size is None
    assert a.vocab_size == len(WORDS)


# ---- files
