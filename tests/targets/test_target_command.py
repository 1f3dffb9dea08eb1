"""`dft-kernels target`, and the sources of texts that it takes."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from target_texts import documents

from dft_kernels.commands import main as cli
from dft_kernels.materials.sources import passages_of, texts_of
from dft_kernels.targets import corpus, target_file
from dft_kernels.targets.blend import style_vector


def test_build_list_show_blend(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, path in enumerate(texts):
        path.write_text("\n\n".join(documents(400, seed)))

    def run(*arguments: Any) -> str:
        assert cli.main(["target", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    for path in texts:
        said = run(
            "build", "--text", path, "--tokenizer", tmp_path / "tokenizer", "--out", path.with_suffix(".safetensors")
        )
        assert " words, 2,400 sentences, " in said
    a, b = (path.with_suffix(".safetensors") for path in texts)
    target = target_file.load(a, tokenizer)
    assert target.about.name == "a"
    assert target.about.source == "a.txt"
    assert target.about.documents > 5
    assert read_in_passages(texts[0])
    said = run("show", a)
    for text in ("source   a.txt", "burstiness", "comma per 1,000 words", "tracked n-grams", "noise floor"):
        assert text in said
    said = run("show", a, "--against", b, "--plot", tmp_path / "plots" / "p.png")
    assert "value / floor" in said
    assert (tmp_path / "plots" / "p.png").stat().st_size > 10_000
    assert "unigram, L2" in run("show", a, "--against", texts[1])
    assert "unigram, L2" not in run("show", "literary", "--against", b).split("literary against b")[1]
    run("show", a, "--plot", tmp_path / "one.png")
    run("blend", a, b, "--weights", 0.25, 0.75, "--out", tmp_path / "c.safetensors")
    mixed = target_file.load(tmp_path / "c.safetensors", tokenizer)
    torch.testing.assert_close(mixed["unigram"], 0.25 * target["unigram"] + 0.75 * target_file.load(b)["unigram"])
    run("blend", a, b, "--gamma", 1.01, "--max-clipped", 0.2, "--out", tmp_path / "d.safetensors")
    beyond = style_vector(target, target_file.load(b), 1.01)
    assert torch.equal(target_file.load(tmp_path / "d.safetensors")["unigram"], beyond["unigram"])
    said = run("list")
    assert all(name in said for name in target_file.presets())
    run("build", "--text", texts[0], "--out", tmp_path / "text.safetensors")
    assert "unigram" not in target_file.load(tmp_path / "text.safetensors", tokenizer)


def read_in_passages(path: Path) -> bool:
    """A file is read passage by passage, none of which is much longer than asked for."""
    sizes = [len(text) for text in passages_of([str(path)], Path())]
    return max(sizes) < 1.2 * corpus.PASSAGE and sum(sizes) == len(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--text", "none.txt", "--out", "t"], "--text must name readable UTF-8 files, got none.txt"),
        (["show", "nothing"], "target: nothing: the file must be there, or be a preset (literary, "),
        (["blend", "literary", "--weights", "2", "--out", "t"], "--weights must sum to 1, got [2.0]"),
        (["blend", "satire", "--gamma", "2", "--out", "t"], "target: --gamma must be of two targets, linear, got 1"),
        (["blend", "satire", "technical", "--gamma", "9", "--out", "t"], "to be clipped at 0, got "),
        (["presets", "--tokenizer", ".", "--out", "t"], "--tokenizer must be a folder or name"),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["target", *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("dft-kernels ")
    assert said in err
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_a_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """hf:NAME[:SPLIT[:COLUMN]], by the library datasets where it is there."""

    class Found(list):  # type: ignore[type-arg]
        column_names = ("text", "story")

    asked = []

    def load_dataset(name: str, split: str, streaming: bool) -> Found:
        assert streaming
        asked.append((name, split))
        return Found([{"text": "one.", "story": "once."}, {"text": "two.", "story": "again."}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts_of(["hf:tales"], tmp_path) == ["one.", "two."]
    assert texts_of(["hf:a/tales:test:story"], tmp_path) == ["once.", "again."]
    assert list(passages_of(["hf:tales:train"], tmp_path)) == ["one.", "two."]
    assert asked == [("tales", "train"), ("a/tales", "test"), ("tales", "train")]
    with pytest.raises(ValueError, match=r"hf:tales must have a column 'words', got \('text', 'story'\)"):
        texts_of(["hf:tales:train:words"], tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:tales needs datasets, got none\. pip install datasets"):
        texts_of(["hf:tales"], tmp_path)
