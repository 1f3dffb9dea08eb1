"""The comparison of SFT and DFT that the demo shows, on a tiny model; the real one is `make demo`'s."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import WORDS, tokenizer  # noqa: F401 - a fixture

from dft_kernels.benchmarks.runs import about
from dft_kernels.commands import demo
from dft_kernels.models.heads import hidden_states
from dft_kernels.training import comparison
from dft_kernels.training.students import every_second_layer, pack


@pytest.fixture
def teacher() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.25, eos_token_id=2, bos_token_id=1,
        )
    )  # fmt: skip


def prose() -> list[str]:
    return [" ".join(WORDS[(start + 3 * n) % 90] for n in range(50)) for start in range(90)]


SIZES = comparison.Sizes(steps=30, batch=2, length=32)


@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_both_ways_from_the_same_start(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811 - a fixture
    out = tmp_path / "out"
    result = comparison.compare(teacher, tokenizer, prose(), SIZES, out)
    assert not list(out.iterdir())  # its own files are gone
    found = result.held_out
    demo.write(result, SIZES, about("cpu"), out)
    assert list(found) == ["student before", "SFT", "DFT", "teacher"]
    assert found["SFT"].cross_entropy < found["student before"].cross_entropy
    assert found["DFT"].kl < found["student before"].kl
    assert found["DFT"].kl < found["SFT"].kl
    assert found["teacher"].kl < 1e-3  # hidden states in bf16
    for way in comparison.WAYS:
        steps = [step for step, _ in result.curves[way]]
        assert steps == [0, 5, 10, 15, 20, 25, 30]
        assert result.curves[way][0][1] is found["student before"]
        assert result.curves[way][-1][1] is found[way]
        assert result.seconds[way] > 0
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["step"]) for row in rows[6:8]] == [("SFT", "30"), ("DFT", "0")]
    with (out / "summary.csv").open() as file:
        summary = {line["model"]: line for line in csv.DictReader(file)}
    for name, line in summary.items():
        assert float(line["kl"]) == found[name].kl
        assert float(line["perplexity"]) == pytest.approx(math.exp(found[name].cross_entropy))
        assert (line["steps"], line["tokens"], line["torch"]) == ("30", "64", torch.__version__)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = (out / "continuations.txt").read_text()
    assert written.count("-- the text itself: ") == written.count("-- DFT: ") == comparison.HELD_OUT
    assert {path.name for path in out.iterdir()} == {"curves.csv", "summary.csv", "curves.png", "continuations.txt"}
    assert [column.header for column in demo.table(result, SIZES, "here", out).columns] == ["held-out text", *found]


def test_too_little_text_is_refused_before_training(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"must hold 76 sequences of 32 tokens, got 1\. Pass more --text"):
        comparison.compare(teacher, tokenizer, prose()[:1], SIZES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_student_has_half_the_layers_and_the_teachers_weights(teacher: Any) -> None:
    student = every_second_layer(teacher)
    assert student.config.num_hidden_layers == len(student.base_model.layers) == 2
    ours, theirs = student.base_model.layers[1], teacher.base_model.layers[2]
    assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert ours.mlp.up_proj.weight is not theirs.mlp.up_proj.weight
    assert teacher.config.num_hidden_layers == len(teacher.base_model.layers) == 4
    ids = torch.randint(0, 97, (2, 5))
    logits = hidden_states(student, ids) @ student.get_output_embeddings().weight.t()
    assert torch.allclose(logits, student(input_ids=ids).logits, atol=1e-5)


def test_pack_keeps_every_token_in_order() -> None:
    tokens = {"a": 5, "b": 6}
    letters = type("Letters", (), {"eos_token_id": 0, "__call__": lambda _, texts, **__: {
        "input_ids": [[tokens[letter] for letter in text] for text in texts]}})()  # fmt: skip
    assert pack(["aab", "b"], letters, 3).tolist() == [[5, 5, 6], [0, 6, 0]]
