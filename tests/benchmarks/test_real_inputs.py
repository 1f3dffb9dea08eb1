"""`dft-kernels bench --inputs`: hidden states of a (tiny) model over text, and teachers that nearly agree with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, word_tokenizer

from dft_kernels.benchmarks import implementations, measure, peers, problems, real, runs, selection, tables
from dft_kernels.benchmarks.inputs import Inputs
from dft_kernels.benchmarks.problems import DISTANCES, Case, Shape
from dft_kernels.commands import main as cli
from dft_kernels.loss.options import DEFAULTS

pytest.importorskip("transformers")
H, V = 16, 100


def case(rows: int = 24, dtype: str = "bfloat16", distance: float = 0.01, loss: str = "forward_kl") -> Case:
    return Case(Shape(rows, H, V), dtype, loss, "both", "cpu", "smollm2", distance)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A tiny model and its text under the name of SmolLM2; how often it was loaded."""
    import transformers

    loaded = []

    def load(*_: Any) -> tuple[Any, Any]:
        loaded.append(1)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=H, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), word_tokenizer(["<pad>", "</s>", "<unk>", *WORDS])

    monkeypatch.setattr(real, "model_of", load)
    monkeypatch.setattr(
        real, "lambada", lambda _: [" ".join(f"word{(7 * n + k * k) % 90}" for k in range(9)) for n in range(20)]
    )
    monkeypatch.setitem(problems.REAL, "smollm2", (H, V))
    return loaded


def test_teachers_are_as_far_as_they_say(model: list[int], tmp_path: Path) -> None:
    said: list[str] = []
    found = real.prepared(case(), tmp_path, said.append)
    assert said == ["smollm2: its hidden states over 24 rows of text, teachers at KL 0.4, 0.01, 0.001"]
    assert real.prepared(case(), tmp_path, said.append) == found
    assert len(said) == len(model) == 1  # the second time it is read
    for distance in DISTANCES:
        assert found.kl[distance] == pytest.approx(distance, rel=0.1)  # bf16 has no nearer one of so few rows
        exact = measure.Exact(case(distance=distance), Inputs.make(case(distance=distance), 0, found.file))
        assert float(exact.loss) == pytest.approx(found.kl[distance], rel=1e-6)
    x, plain = Inputs.make(case(), 0, found.file), Inputs.make(case(loss="cross_entropy", distance=0.0), 1, found.file)
    assert torch.equal(x.weight, x.teacher_weight)
    assert not torch.equal(x.hidden, plain.hidden)
    assert torch.equal(x.hidden.sort(0).values, plain.hidden.sort(0).values)  # the same rows from another on
    assert torch.equal(plain.hidden, plain.teacher_hidden)


def test_rows_repeat_where_the_text_ends(model: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "TEXT_ROWS", 16)
    found = real.prepared(case(40), tmp_path, lambda _: None)
    assert found.rows == 16
    x = Inputs.make(case(40), 0, found.file)
    assert torch.equal(x.hidden[:16], x.hidden[16:32])
    assert not torch.equal(x.hidden[0], x.hidden[1])
    ids = real.windows(["word1 word2"], word_tokenizer(["<pad>", "</s>", "<unk>", *WORDS]), 2, 3)
    assert ids.shape == (2, 3)
    assert torch.equal(ids[0], ids[1])  # two words and the end of a text


def test_files_of_another_recipe_are_made_anew_and_damage_is_said(model: list[int], tmp_path: Path) -> None:
    file = real.prepared(case(), tmp_path, lambda _: None).file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "RECIPE", "another")
        real.prepared(case(), tmp_path, lambda _: None)
    real.prepared(case(), tmp_path, lambda _: None)
    assert len(model) == 3
    with pytest.raises(ValueError, match=r"bench: .*weight must have shape \[101, 16\], got \[100, 16\]. Delete it"):
        Inputs.make(case()._replace(shape=Shape(24, H, V + 1)), 0, file)
    file.write_bytes(b"none")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        real.prepared(case(), tmp_path, lambda _: None)


def test_the_table_says_the_kl_and_the_errors(
    model: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where bf16 logits are nearly all of the error nobody is taken to be another loss, and memory is measured once."""
    measured, jobs = [], []
    watch = runs.watch
    monkeypatch.setattr(runs, "watch", lambda job, *rest: (jobs.append(job), watch(job, *rest))[1])
    monkeypatch.setattr(problems, "TEXT_ROWS", 16)
    path = tmp_path / "rows.csv"
    arguments = ["--inputs", "smollm2", "--shape", f"24,{H},{V}", "--rounds", "1", "--csv", str(path)]
    choice = ["--backend", "native", "--peer", "eager", "--device", "cpu", "--loss", "forward_kl"]
    assert cli.main(["bench", *arguments, *choice, "--cache", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    measured = tables.read(path)
    assert [(r.distance, r.inputs) for r in measured] == [(d, "smollm2") for d in DISTANCES for _ in range(2)]
    for row in measured:
        assert row.status == "ok", row
        assert row.teacher_kl == pytest.approx(row.distance, rel=0.1)
        assert 0 < row.error_dhidden < (0.01 if row.ours else 10)
        assert f"KL(teacher || model) is {row.teacher_kl:.3g} nats, measured in float64" in said
    errors = {(row.ours, row.distance): row.error_dhidden for row in measured}
    assert errors[False, 0.001] > 10 * errors[True, 0.001]
    assert [len(job.names) for job in jobs if job.memory] == [1, 1]
    assert "rows repeat after 16" in said


def test_bf16_logits_are_measured_where_the_loss_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, and as it is where the functions take `logits_dtype`."""
    assert (implementations.NARROW in peers.everyone()) == ("logits_dtype" in DEFAULTS)
    random = Case(Shape(24, 16, 96), "bfloat16", "forward_kl", "both", "cpu")
    given: list[Any] = []
    if "logits_dtype" not in DEFAULTS:
        monkeypatch.setitem(DEFAULTS, "logits_dtype", None)
        for name in ("linear_cross_entropy", "linear_distribution_loss"):
            function = getattr(implementations, name)

            def narrow(*tensors: Any, function: Any = function, logits_dtype: Any = None, **options: Any) -> Any:
                given.append(logits_dtype)
                return function(*tensors, **options)

            monkeypatch.setattr(implementations, name, narrow)
        expected = [torch.bfloat16] * 2
    else:
        expected = []
    for loss in ("cross_entropy", "forward_kl"):
        assert implementations.NARROW in selection.names(loss)
        assert implementations.NARROW not in selection.names(loss, backends=["native"])
        one = random._replace(loss=loss)
        call = peers.everyone()[implementations.NARROW].prepare(one)
        exact = measure.Exact(one, Inputs.make(one, 0))
        errors = exact.errors(exact.called(call))
        assert max(errors["dhidden"], errors["dweight"]) < 0.05
    assert given == expected
    assert tables.Row(
        **{f.name: "" for f in dataclasses.fields(tables.Row)} | {"implementation": implementations.NARROW}
    ).ours
    with pytest.raises(implementations.Unavailable, match="it is for bfloat16 inputs, not for float32"):
        peers.everyone()[implementations.NARROW].prepare(random._replace(dtype="float32"))
