"""Fixtures of the tests of targets."""

from __future__ import annotations

from typing import Any

import pytest
from target_texts import WORDS, documents
from tiny_models import word_tokenizer

from dft_kernels.targets import corpus
from dft_kernels.targets.target import Target


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def made(tokenizer: Any) -> Target:
    return corpus.build(documents(60), tokenizer, name="made", source="a test", licence="none", tokenizer_name="tiny")
