"""A pool of random texts, and a tokenizer of their words."""

from __future__ import annotations

from typing import Any

import pytest
from target_texts import WORDS
from tiny_models import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS)
