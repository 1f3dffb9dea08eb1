"""Texts by an encoder as features: the kernel that they are of, and what people wrote where rollouts begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import WORDS, far, tiny_encoder
from training_runs import config

from dft_kernels.evaluation.embeddings import bandwidths, gram
from dft_kernels.generation.sampling import roll_out
from dft_kernels.materials.encoders import embed
from dft_kernels.terms import TextMMD
from dft_kernels.training.text_features import TextFeatures, written

TEXTS = [" ".join(WORDS[(7 * n + k * (n + 1)) % 90] for k in range(3 + n % 4)) for n in range(24)]


def test_products_are_the_kernel_of_the_evaluation(tokenizer: Any) -> None:
    encoder = tiny_encoder(tokenizer)
    phi = TextFeatures(encoder, TEXTS[:12], r=4096)
    vectors = embed(encoder, TEXTS).double().numpy()
    kernel = gram(vectors, bandwidths(vectors[:12]))
    features = phi(TEXTS)
    assert features.shape == (24, 3 * 4096)
    assert float(np.abs((features @ features.t()).numpy() - kernel).max()) < 6 / (3 * 4096) ** 0.5
    assert float(kernel.min()) < 0.5  # what they are compared with is no constant
    torch.testing.assert_close(phi(TEXTS[5:7]), features[5:7])


def test_people_are_those_behind_the_beginnings(tokenizer: Any, tmp_path: Path) -> None:
    """As long as rollouts, after prompts as long as theirs, without the end of the text."""
    encoder = tiny_encoder(tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    human = [WORDS[5], f"{WORDS[7]} {WORDS[8]}", WORDS[9]]
    sequences = [
        tokenizer(" ".join(WORDS[3:6]))["input_ids"][:2] + tokenizer(human[0])["input_ids"] + [tokenizer.eos_token_id],
        tokenizer(" ".join(WORDS[n] for n in (1, 2, 7, 8, 30, 31)))["input_ids"],
        tokenizer(f"{WORDS[4]} {human[2]}")["input_ids"],
        tokenizer(WORDS[1])["input_ids"],  # nothing behind it
    ]
    args = config(tmp_path, rollout_prompt=2, rollout_length=2)
    term = written(encoder, None, tokenizer, sequences, args).term
    want = TextMMD(TextFeatures(encoder, human), human)
    torch.testing.assert_close(term.target, want.target)
    assert float(term.value(want.reads(human).mean(0), torch.ones(()))) < 1e-20
    far = float(term.value(term.reads(TEXTS).mean(0), torch.ones(())))
    assert far > 0.05
    with pytest.raises(
        ValueError, match=r"text must hold two different texts behind where rollouts begin at least, .* 1"
    ):
        written(encoder, None, tokenizer, [ids[0], ids[0]], args)


def test_the_gain_is_of_its_own_texts(tokenizer: Any, tmp_path: Path) -> None:
    """A tilt by s moves J by s V and costs s^2 V / 2 a text: where both are least together, as far as the gain says."""
    encoder, args = tiny_encoder(tokenizer), config(tmp_path, rollout_prompt=2, rollout_length=6)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS] * 3
    people = written(encoder, far(), tokenizer, sequences, args)
    gain = people.gain()
    assert gain == people.gain()  # of one seed
    drawn = roll_out(far(), [ids[:2] for ids in sequences] * 100, 6, tokenizer.eos_token_id, 1)
    many = [tokenizer.decode([t for t in row if t > 2]) for row in drawn.target.tolist()]
    phi = people.term.reads(many)
    apart = phi.mean(0) - people.term.target
    tokens = float((drawn.target >= 0).sum() / len(phi))
    want = tokens * float(4 * (phi @ apart).var()) / (2 * float(apart @ apart))
    assert gain == pytest.approx(want, rel=0.7)  # 64 texts are few
    assert people.term.gain(many, tokens) == pytest.approx(want, rel=0.05)
    with pytest.raises(ValueError, match=r"TextMMD\.gain: texts must be 6 or more, got 5"):
        people.term.gain(TEXTS[:5], 6.0)
