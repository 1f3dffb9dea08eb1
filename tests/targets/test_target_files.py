"""Files of targets: what is saved is loaded, and damaged or foreign ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from target_texts import WORDS, documents
from tiny_models import word_tokenizer

from dft_kernels.store.fingerprint import tokenizer_fingerprint
from dft_kernels.targets import corpus, target_file
from dft_kernels.targets.target import About, Target, burstiness


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
    other = word_tokenizer([*WORDS, "more"])
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
