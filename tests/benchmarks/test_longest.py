"""bench/longest.py on a tiny model with a large vocabulary, and its search on made-up curves."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")

SPEC = importlib.util.spec_from_file_location("longest", Path(__file__).parent.parent.parent / "bench" / "longest.py")
assert SPEC is not None
assert SPEC.loader is not None
bench: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=50000, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_attached_takes_less_and_over_the_limit_is_no_crash(folder: Path) -> None:
    length, plain, attached = 1024, "transformers cross-entropy", "attached cross-entropy"
    logits = length * 50000 * 4
    runs = [(folder, plain, 8 * GIB), (folder, attached, 8 * GIB), (folder, plain, GIB // 4), (folder, "no way", GIB)]
    with ThreadPoolExecutor() as pool:  # they mostly import
        theirs, ours, over, failed = (pool.submit(bench.measure, at, way, length, most) for at, way, most in runs)
        assert theirs.result().peak - ours.result().peak > 1.5 * logits
        assert theirs.result().seconds > 0
        assert over.result() == (None, None)
        with pytest.raises(RuntimeError, match=rf"longest: no way at {length} must end well, got 1: KeyError"):
            failed.result()


def test_both_ways_of_a_divergence_are_one_loss(folder: Path) -> None:
    ids = torch.arange(40)[None]
    load = transformers.AutoModelForCausalLM.from_pretrained
    teacher = load(folder, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(5)
        model = load(folder, dtype=torch.float32).train()
        eager = bench.WAYS["eager forward KL"].loss(model, teacher, ids[:, :-1])
        attached = bench.WAYS["attached forward KL"].loss(bench.attach(model), teacher, ids)  # leaves the last row out
    assert float(eager) > 1e-3
    assert float(attached) == pytest.approx(float(eager), rel=1e-4)


CURVES: dict[str, Callable[[int], float]] = {
    "line": lambda n: 2000 + 3 * n,
    "steep then flat": lambda n: 1000 + 2 * min(n, 512) + 0.05 * n,
    "flat then steep": lambda n: 3000 + 0.1 * n + max(0, n - 5000) ** 2 / 1e3,
    "a step": lambda n: 1000 if n < 3333 else 1e6,
    "flat": lambda n: 4100 + n / 1e3,
    "square": lambda n: 100 + n * n / 50,
}


@pytest.mark.parametrize("ceiling", [1.0, 1.3, 100.0])
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("budget", [2600, 4200, 9000])
def test_the_search_ends_at_a_length_that_fits_beside_one_that_does_not(name: str, budget: int, ceiling: float) -> None:
    asked: dict[int, int | None] = {}

    def peak(length: int) -> int | None:
        assert length not in asked
        found = math.ceil(CURVES[name](length))
        asked[length] = found if found <= ceiling * budget else None
        return asked[length]

    found = bench.longest(peak, budget, 32768)
    assert len(asked) <= 22
    fitting = [n for n, bytes_ in asked.items() if bytes_ is not None and bytes_ <= budget]
    assert found == max(fitting, default=0)
    if found < 32768:
        above = min(n for n in asked if n > found)
        assert above - found <= max(bench.GRAIN, bench.RESOLUTION * found)


def test_what_fits_once_and_not_again_is_not_the_longest() -> None:
    asked = []

    def again(length: int) -> int | None:
        asked.append(length)
        return {3712: 5, 3200: 4, 5000: None}[length]

    assert bench.confirmed(again, [256, 3200, 5000, 3712], 4) == 3200
    assert asked == [5000, 3712, 3200]
    assert bench.confirmed(lambda length: None, [256, 512], 4) == 0
