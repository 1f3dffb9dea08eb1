"""Blends of targets: of texts together, by hand, and style vectors."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from target_texts import document

from dft_kernels.targets import corpus
from dft_kernels.targets.blend import blend, style_vector
from dft_kernels.targets.comparison import compare
from dft_kernels.targets.target import About, Target


def test_a_linear_blend_is_the_target_of_the_texts_together(tokenizer: Any) -> None:
    """Weights that are the texts' shares of all tokens."""
    short = [document(random.Random(n), 8) for n in range(150)]
    long = [
        text.replace("The", "word1 word2 word3 The").replace("!", "?").replace(".", ", word7.") for text in short[:100]
    ]
    parts = [corpus.build(texts, tokenizer, name=name) for texts, name in ((short, "short"), (long, "long"))]
    together = corpus.build(short + long, tokenizer, name="together")
    tokens = [float(one.about.tokens or 0) for one in parts]
    found = blend(parts, [one / sum(tokens) for one in tokens])
    exact = {
        "soft_hazard",
        "unigram",
        "sentence_end",
        "hazard",
        "sentence_tokens",
        "punctuation_rate",
        "sentence_words",
    }
    exact |= {"word_length", "punctuation_per_1000_words", "punctuation_features"}
    for name in exact:
        torch.testing.assert_close(found[name], together[name], rtol=1e-4, atol=1e-6)
    for name in ("punctuation_gap", "punctuation_transition", "type_token_ratio"):  # but for where documents begin
        torch.testing.assert_close(found[name], together[name], rtol=0, atol=0.03)
    apart = compare(*(one.tensors for one in parts))["bigram, L2"]
    assert compare(found.tensors, together.tensors)["bigram, L2"] < 0.1 * apart  # of those that one part alone tracks
    assert (found.about.tokens, found.about.words) == (together.about.tokens, together.about.words)
    assert "entropy" not in found
    assert found.noise == {}
    assert (
        float((found["hazard"] - sum(parts[n]["hazard"] * tokens[n] / sum(tokens) for n in (0, 1))).abs().max()) > 0.01
    )


def simple(**tensors: Any) -> Target:
    about = About("simple", "", "", 1, 1, 100, 10, 120, "tiny", "0")
    return Target(about, {name: torch.as_tensor(value) for name, value in tensors.items()})


def trie(rows: dict[tuple[int, int], dict[int, float]], context: list[float]) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([0, *(len(row) for row in rows.values())])
    completions = [(token, p) for row in rows.values() for token, p in row.items()]
    return {
        "unigram": torch.full((8,), 0.125),
        "ngram_contexts": torch.tensor(list(rows), dtype=torch.int32),
        "ngram_starts": sizes.cumsum(0).int(),
        "ngram_completions": torch.tensor([token for token, _ in completions], dtype=torch.int32),
        "ngram_probability": torch.tensor([p for _, p in completions]),
        "ngram_context_probability": torch.tensor(context),
    }


def test_blends_by_hand() -> None:
    a = simple(unigram=[0.5, 0.25, 0.25, 0.0], sentence_tokens=[0.5, 0.5], hazard=[0.5, 0.5])
    b = simple(unigram=[0.25, 0.25, 0.0, 0.5], sentence_tokens=[0.25, 0.75], hazard=[0.25, 1.0])
    linear = blend([a, b], [0.25, 0.75])
    assert linear["unigram"].tolist() == [0.3125, 0.25, 0.0625, 0.375]
    # a: 1 + 1 tokens a sentence, b: 1 + 0.75
    ended = [0.25 / 2 * 0.5 + 0.75 / 1.75 * 0.25, 0.25 / 2 * 0.5 + 0.75 / 1.75 * 0.75]
    risk = [0.25 / 2 + 0.75 / 1.75, 0.25 / 2 * 1 + 0.75 / 1.75 * 0.75]
    assert linear["sentence_tokens"].tolist() == pytest.approx([one / sum(ended) for one in ended])
    assert linear["hazard"].tolist() == pytest.approx([e / r for e, r in zip(ended, risk, strict=True)])
    log = blend([a, b], [0.5, 0.5], "log_linear")
    assert log["unigram"].tolist() == pytest.approx(
        [0.125**0.5 / (0.125**0.5 + 0.25), 0.25 / (0.125**0.5 + 0.25), 0, 0]
    )
    lengths = [0.125**0.5, 0.375**0.5]
    assert log["sentence_tokens"].tolist() == pytest.approx([one / sum(lengths) for one in lengths])
    assert log["hazard"].tolist() == pytest.approx([lengths[0] / sum(lengths), 0.5**0.5])
    assert blend([a, b], [1, 0], "log_linear")["unigram"].tolist() == a["unigram"].tolist()


def test_ngram_blends_by_hand() -> None:
    a = simple(**trie({(-1, 1): {2: 0.5, 3: 0.25}, (-1, 4): {0: 1.0}, (0, 0): {0: 0.5}}, [0.25, 0.125, 0.5]))
    b = simple(**trie({(-1, 1): {2: 0.25, 5: 0.5}, (0, 0): {0: 0.125}}, [0.5, 0.25]))
    found = blend([a, b], [0.5, 0.5])
    assert found["ngram_contexts"].tolist() == [[-1, 1], [-1, 4], [0, 0]]
    assert found["ngram_context_probability"].tolist() == [0.375, 0.0625, 0.375]
    assert found["ngram_starts"].tolist() == [0, 3, 4, 5]
    assert found["ngram_completions"].tolist() == [2, 3, 5, 0, 0]
    joint = [(0.125 + 0.125) / 2, 0.0625 / 2, 0.25 / 2, 0.125 / 2, (0.25 + 0.03125) / 2]
    assert found["ngram_probability"].tolist() == pytest.approx(
        [j / c for j, c in zip(joint, [0.375, 0.375, 0.375, 0.0625, 0.375], strict=True)]
    )
    found = blend([a, b], [0.5, 0.5], "log_linear")
    assert found["ngram_contexts"].tolist() == [[-1, 1], [0, 0]]
    both, rest = 0.125**0.5, (0.5 * 0.75) ** 0.5  # of token 2, and of all else
    assert float(found["ngram_probability"][0]) == pytest.approx(both / (both + rest))
    kept, rest = 0.125**0.5, ((1 - 0.25) * (1 - 0.5)) ** 0.5
    assert float(found["ngram_context_probability"][0]) == pytest.approx(kept / (kept + rest))


def test_style_vectors() -> None:
    a, b = simple(unigram=[0.5, 0.375, 0.125]), simple(unigram=[0.25, 0.25, 0.5])
    for gamma, value in ((0, a["unigram"]), (1, b["unigram"]), (0.5, (a["unigram"] + b["unigram"]) / 2)):
        assert torch.equal(style_vector(a, b, gamma)["unigram"], value)
    assert style_vector(a, b, -0.25)["unigram"].tolist() == [0.5625, 0.40625, 0.03125]
    assert style_vector(a, b, -0.5)["unigram"].tolist() == pytest.approx([0.625 / 1.0625, 0.4375 / 1.0625, 0])
    with pytest.raises(ValueError, match=r"gamma must leave at most 10% of unigram to be clipped at 0, got 3\d\.\d%"):
        style_vector(a, b, -2.5)
    assert style_vector(a, b, -2.5, max_clipped=0.5)["unigram"][2] == 0
    with pytest.raises(ValueError, match="style_vector: gamma must be finite, got nan"):
        style_vector(a, b, math.nan)


def test_blends_that_are_refused(made: Target) -> None:
    a, b = simple(unigram=[1.0, 0.0]), simple(unigram=[0.0, 1.0])
    for weights, kind, said in (
        ([0.5], "linear", "weights must be one for each of 2 targets, got 1"),
        ([0.5, 0.6], "linear", r"weights must sum to 1, got \[0.5, 0.6\], of sum 1.1"),
        ([math.nan, 1], "linear", "weights must sum to 1"),
        ([-0.5, 1.5], "linear", "weights must be at least 0"),
        ([0.5, 0.5], "cubic", "kind must be one of linear, log_linear, got 'cubic'"),
        ([0.5, 0.5], "log_linear", "unigram must be of targets with something in common, got nothing"),
    ):
        with pytest.raises(ValueError, match="blend: " + said):
            blend([a, b], weights, kind)
    with pytest.raises(ValueError, match="blend: targets must be of one tokenizer, got simple: tiny, made: tiny"):
        blend([a, made], [0.5, 0.5])
