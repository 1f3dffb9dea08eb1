"""A fixture under which `import vllm` finds tests/stand_in_vllm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    forget()
    for name in (
        "VLLM_LOGGING_LEVEL",
        "VLLM_LOGGING_STREAM",
        "VLLM_NO_USAGE_STATS",
    ):  # which the engine sets: gone again afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in_vllm")
    import vllm

    yield vllm
    forget()
