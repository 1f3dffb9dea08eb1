"""Targets: every statistic against a count by hand, streaming, noise floors, files, blends, the command, presets."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dft_kernels.commands import main as cli
from dft_kernels.store.fingerprint import tokenizer_fingerprint
from dft_kernels.targets import corpus, distances, ngrams, target_file
from dft_kernels.targets.blend import at_risk, blend, style_vector
from dft_kernels.targets.comparison import between, compare
from dft_kernels.targets.punctuation import CLASSES, marks
from dft_kernels.targets.target import STATISTICS, About, Target, burstiness

transformers = pytest.importorskip("transformers")
pytest.importorskip("nupunkt")
from dft_kernels.materials import texts as preset_texts

WORDS = [
    "<pad>", "</s>", "<unk>", "The", "cat", "sat", "dog", "ran", "far", "It", "was", "late", ".", ",", "!", "?", '."',
    "the", "and", *(f"word{n}" for n in range(60)),
]  # fmt: skip
WHERE_SENTENCES_END = 30  # SmolLM2's "."
COMMA, STOP, EXCLAMATION, QUOTE = (CLASSES.index(name) for name in ("comma", "full_stop", "exclamation", "quote"))


def tokenizer_of(words: list[str] = WORDS) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of()


def document(generator: random.Random, sentences: int = 6) -> str:
    def sentence() -> str:
        words = [f"word{int(60 * generator.random() ** 2)}" for _ in range(generator.randint(3, 12))]
        return "The " + " ".join(words[:2]) + ", " + " ".join(words[2:]) + generator.choice("...!?")

    return " ".join(sentence() for _ in range(sentences))


def documents(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [document(generator) for _ in range(count)]


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
    words = tokenizer_of([*WORDS, "Mr"])
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


@pytest.fixture(scope="module")
def made(tokenizer: Any) -> Target:
    return corpus.build(documents(60), tokenizer, name="made", source="a test", licence="none", tokenizer_name="tiny")


def test_what_is_saved_is_loaded(made: Target, tokenizer: Any, tmp_path: Path) -> None:
    path = target_file.save(made, tmp_path / "new" / "t.safetensors")
    found = target_file.load(path, tokenizer)
    assert found.about == made.about
    assert found.noise == made.noise
    assert found.warnings == made.warnings
    assert set(found) == set(made)
    assert all(torch.equal(found[name], made[name]) and found[name].dtype == made[name].dtype for name in made)
    assert [one.name for one in path.parent.iterdir()] == ["t.safetensors"]
    sparse = torch.zeros(1000)
    sparse[7] = 1
    target_file.save(Target(made.about, {"unigram": sparse}), path)
    assert torch.equal(target_file.load(path)["unigram"], sparse)
    assert path.stat().st_size < 2000


def test_damaged_files_are_refused_by_field(made: Target, tmp_path: Path) -> None:
    path = target_file.save(made, tmp_path / "t.safetensors")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")

    def refused(changed: bytes, said: str) -> None:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"target: .*t\.safetensors: {said}"):
            target_file.load(path)

    refused(data[:-9], "the file must be a whole safetensors file")
    refused(b"", "the file must be a whole safetensors file")
    refused(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "sha256 must be [0-9a-f]{64}, as its header says, got")
    refused(data[:end].replace(b"a test", b"a tesT") + data[end:], "sha256 must be")
    refused(data[:end].replace(b"dft_kernels target", b"dft_kernels Target") + data[end:], "format must be")
    refused(data[:end].replace(b'version\\": 1', b'version\\": 2') + data[end:], "version must be 1, got 2")
    with pytest.raises(ValueError, match=r"nowhere: the file must be there, or be a preset"):
        target_file.load("nowhere")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="format must be 'dft_kernels target', got no header of one"):
        target_file.load(path)


def test_another_tokenizer_is_refused(made: Target, tmp_path: Path) -> None:
    path = target_file.save(made, tmp_path / "t.safetensors")
    other = tokenizer_of([*WORDS, "more"])
    with pytest.raises(ValueError, match=rf"tokenizer_sha256 must be {tokenizer_fingerprint(other)}, .* of tiny"):
        target_file.load(path, other)
    text = corpus.build(documents(3), name="text")
    target_file.save(text, path)
    assert target_file.load(path, other).about == text.about


def test_tensors_that_no_corpus_has(made: Target) -> None:
    for name, value, said in (
        ("unigram", torch.ones(3), "must sum to 1, got 3"),
        ("unigram", torch.ones(3).double(), "must be 1-d torch.float32, got 1-d torch.float64"),
        ("hazard", torch.tensor([1.5]), "must be at most 1, got 1.5"),
        ("hazard", torch.tensor([torch.nan]), "must be finite and at least 0"),
        ("bigrams", torch.ones(1), "must be one of unigram, "),
        ("ngram_starts", torch.tensor([0, 3], dtype=torch.int32), "ngram_starts must rise from 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Target(made.about, {**made.tensors, name: value})
    with pytest.raises(ValueError, match="n-grams must have all of"):
        Target(made.about, {"ngram_starts": torch.tensor([0], dtype=torch.int32)})
    with pytest.raises(ValueError, match="the text of empty must hold words"):
        corpus.build([" \n"], name="empty")
    with pytest.raises(ValueError, match="--tokenizer must be a fast one"):
        corpus.Counts(object())
    assert burstiness(torch.tensor([0.0, 1.0])) == -1
    assert json.dumps(About("n", "s", "l", 1, 2, 3, 4).__dict__)


# ---- blends


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


# ---- the command


def test_build_list_show_blend(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, path in enumerate(texts):
        path.write_text("\n\n".join(documents(400, seed)))

    def run(*arguments: Any) -> str:
        assert cli.main(["target", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    for path in texts:
        said = run(
            "build", "--text", path, "--tokenizer", tmp_path / "tokenizer", "--out", path.with_suffix(".safetensors")
        )
        assert " words, 2,400 sentences, " in said
    a, b = (path.with_suffix(".safetensors") for path in texts)
    target = target_file.load(a, tokenizer)
    assert target.about.name == "a"
    assert target.about.source == "a.txt"
    assert target.about.documents > 5
    assert read_in_passages(texts[0])
    said = run("show", a)
    for text in ("source   a.txt", "burstiness", "comma per 1,000 words", "tracked n-grams", "noise floor"):
        assert text in said
    said = run("show", a, "--against", b, "--plot", tmp_path / "plots" / "p.png")
    assert "value / floor" in said
    assert (tmp_path / "plots" / "p.png").stat().st_size > 10_000
    assert "unigram, L2" in run("show", a, "--against", texts[1])
    assert "unigram, L2" not in run("show", "literary", "--against", b).split("literary against b")[1]
    run("show", a, "--plot", tmp_path / "one.png")
    run("blend", a, b, "--weights", 0.25, 0.75, "--out", tmp_path / "c.safetensors")
    mixed = target_file.load(tmp_path / "c.safetensors", tokenizer)
    torch.testing.assert_close(mixed["unigram"], 0.25 * target["unigram"] + 0.75 * target_file.load(b)["unigram"])
    run("blend", a, b, "--gamma", 1.01, "--max-clipped", 0.2, "--out", tmp_path / "d.safetensors")
    beyond = style_vector(target, target_file.load(b), 1.01)
    assert torch.equal(target_file.load(tmp_path / "d.safetensors")["unigram"], beyond["unigram"])
    said = run("list")
    assert all(name in said for name in target_file.presets())
    run("build", "--text", texts[0], "--out", tmp_path / "text.safetensors")
    assert "unigram" not in target_file.load(tmp_path / "text.safetensors", tokenizer)


def read_in_passages(path: Path) -> bool:
    """A file is read passage by passage, none of which is much longer than asked for."""
    from dft_kernels.materials.sources import passages_of

    sizes = [len(text) for text in passages_of([str(path)], Path())]
    return max(sizes) < 1.2 * corpus.PASSAGE and sum(sizes) == len(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--text", "none.txt", "--out", "t"], "--text must name readable UTF-8 files, got none.txt"),
        (["show", "nothing"], "target: nothing: the file must be there, or be a preset (literary, "),
        (["blend", "literary", "--weights", "2", "--out", "t"], "--weights must sum to 1, got [2.0]"),
        (["blend", "satire", "--gamma", "2", "--out", "t"], "target: --gamma must be of two targets, linear, got 1"),
        (["blend", "satire", "technical", "--gamma", "9", "--out", "t"], "to be clipped at 0, got "),
        (["presets", "--tokenizer", ".", "--out", "t"], "--tokenizer must be a folder or name"),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["target", *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("dft-kernels ")
    assert said in err
    assert not list(tmp_path.iterdir())


# ---- presets


def test_the_presets_are_sane() -> None:
    shipped = [name for name, recipe in preset_texts.RECIPES.items() if recipe.shipped]
    assert target_file.presets() == sorted(shipped)
    paths = [target_file.PRESETS / f"{name}.safetensors" for name in shipped]
    assert max(path.stat().st_size for path in paths) < 1e6
    assert sum(path.stat().st_size for path in paths) < 6e6
    found = {name: target_file.load(name) for name in shipped}
    tokenizers = {target.about.tokenizer_sha256 for target in found.values()}
    assert len(tokenizers) == 1
    for name, target in found.items():
        assert target.about.name == name
        assert preset_texts.RECIPES[name].licence == target.about.licence
        assert "sha256" in target.about.source
        assert set(STATISTICS) == set(target)
        assert target.vocab_size == 49152
        assert (target.about.tokens or 0) > 50_000
        assert len(target.noise) == 17
        assert float(target["unigram"].double().sum()) == pytest.approx(1, abs=1e-5)
        assert 0 <= float(target["hazard"].min()) <= float(target["hazard"].max()) <= 1
        assert 8 < float((target["sentence_words"] * torch.arange(257)).sum()) < 40
        assert 0.6 < float(target["type_token_ratio"]) < 0.95
        assert 1 < float((target["entropy"] * target["entropy_weight"]).sum()) < 8
        # token and text statistics tell the same
        tokens_a_sentence = (target.about.tokens or 0) / target.about.sentences
        assert float(at_risk(target).sum()) == pytest.approx(tokens_a_sentence, rel=0.01)
        assert WHERE_SENTENCES_END in (target["sentence_end"] * target["unigram"]).topk(3).indices
        rate = target["punctuation_rate"] * (target.about.tokens or 0) / target.about.words * 1000
        per_1000 = target["punctuation_per_1000_words"]
        assert float(rate[COMMA]) == pytest.approx(float(per_1000[COMMA]), rel=0.02)
        assert 0.9 < float(rate[STOP] / per_1000[STOP]) < 1.1
    colon, semicolon = CLASSES.index("colon"), CLASSES.index("semicolon")

    def marks_of(name: str, kind: int) -> float:
        return float(found[name]["punctuation_per_1000_words"][kind])

    assert marks_of("scripture", colon) > 2 * marks_of("reference", colon)
    assert marks_of("literary", semicolon) > 2 * marks_of("technical", semicolon)
    distances_of = between(found["literary"], found["technical"])
    floors = found["technical"].noise
    assert all(value > floors[name] for name, value in distances_of.items())


def test_texts_of_presets(tmp_path: Path) -> None:
    assert preset_texts.unwrapped("a b\n c\n\n\n d\n") == "a b c\n\nd\n"
    with pytest.raises(ValueError, match=r"target: presets must be of literary, .* got 'news'"):
        preset_texts.documents_of("news", tmp_path)
    page = preset_texts._Paragraphs()
    page.feed('<p>no</p><div class="para">One <b>two</b><pre>x = 1</pre> three<div class="list">no</div></div>no')
    assert preset_texts.unwrapped("".join(page.parts)) == "One two three\n"
    data = tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    data.parent.mkdir(parents=True)
    lines = [b"Line one", b"", b"caf\xc3\xa9"]
    body = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    body += b"".join(struct.pack(">ii", 262153, len(line)) + line for line in lines)
    data.write_bytes((struct.pack(">i", len(body)) + zlib.compress(body)) * 2)
    assert list(preset_texts._austen(tmp_path)) == ["Line one\n\ncafé\n"] * 2
    text = "<note>no</note><title>T</title><w>In</w> the<l/>beginning &amp; <chapter/>end"
    packed = zlib.compress(text.encode())
    (tmp_path / "nt.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(text)))
    (tmp_path / "nt.bzz").write_bytes(packed)
    assert list(preset_texts._sword(tmp_path)) == ["T\n\nIn the beginning &\n\nend\n"]


def test_a_dataset_is_a_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """hf:NAME[:SPLIT[:COLUMN]], by the library datasets where it is there."""
    import sys
    import types

    from dft_kernels.materials.sources import passages_of, texts_of

    class Found(dict):  # type: ignore[type-arg]
        column_names = ("text", "story")

    asked = []

    def load_dataset(name: str, split: str) -> Found:
        asked.append((name, split))
        return Found(text=["one.", "two."], story=["once."])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts_of(["hf:tales"], tmp_path) == ["one.", "two."]
    assert texts_of(["hf:a/tales:test:story"], tmp_path) == ["once."]
    assert list(passages_of(["hf:tales:train"], tmp_path)) == ["one.", "two."]
    assert asked == [("tales", "train"), ("a/tales", "test"), ("tales", "train")]
    with pytest.raises(ValueError, match=r"hf:tales must have a column 'words', got \('text', 'story'\)"):
        texts_of(["hf:tales:train:words"], tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:tales needs datasets, got none\. pip install datasets"):
        texts_of(["hf:tales"], tmp_path)
