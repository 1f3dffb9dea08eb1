"""Fixtures of the training runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tokenizer  # noqa: F401 - a fixture
from training_runs import written

from dft_kernels.store.reader import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return written(tmp_path)
