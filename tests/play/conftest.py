"""A tiny model of words, and what a page serves of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from target_texts import WORDS, documents
from tiny_models import far, word_tokenizer

from dft_kernels.play.session import Served
from dft_kernels.targets import corpus, target_file
from dft_kernels.targets.target import Target

NASTY = "<b>&\"'x"  # of the vocabulary, where a text of the model shows what is done with it


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer([*WORDS, NASTY])


@pytest.fixture(scope="session")
def model() -> Any:
    """Of tokenizer's words, with 512 positions; its texts never end."""
    made = far(vocab_size=len(WORDS) + 1, max_position_embeddings=512, eos_token_id=1)
    made.generation_config.suppress_tokens = [1]
    return made


@pytest.fixture(scope="session")
def target(tokenizer: Any) -> Target:
    return corpus.build(documents(60), tokenizer, name="made", source="a test", licence="none", tokenizer_name="tiny")


@pytest.fixture(scope="session")
def file(target: Target, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(target_file.save(target, tmp_path_factory.mktemp("target") / "made.safetensors"))


@pytest.fixture(scope="session")
def folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model lies."""
    at = tmp_path_factory.mktemp("model")
    model.save_pretrained(at)
    tokenizer.save_pretrained(at)
    return at


@pytest.fixture
def served(model: Any, tokenizer: Any, target: Target, file: str) -> Served:
    """Without a base."""
    return Served({"tiny": model}, tokenizer, {file: target}, style_base=file)
