"""Materials: fetched once, checked, refused where they are others."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from dft_kernels.materials import models as materials
from dft_kernels.materials import texts as preset_texts
from dft_kernels.materials.models import COQA
from dft_kernels.materials.records import Faults
from dft_kernels.materials.sources import check_model, check_text, documents_of, texts_of


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


def test_dialogues(tmp_path: Path) -> None:
    """Each turn of CoQA's rows tells its whole dialogue: one a story, as records whose first question has it."""
    rows = []
    for story, turns in (("A barn.", [("What?", "a barn"), ("Where?", "here")]), ("A cat.", [("Who?", "a cat")])):
        for number in range(len(turns)):
            told = [{"question": question, "answer": answer} for question, answer in turns]
            rows.append({"doc": {"id": f"{story}_turn{number}", "story": story, "previous_qa": told}})
    file = tmp_path / COQA.package / COQA.version / COQA.file
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as lines:
        lines.write("\n".join(json.dumps(row) for row in rows))
    assert [len(one.turns) for one in materials.coqa(tmp_path)] == [2, 1]
    (first, _) = documents_of(["coqa"], tmp_path, Faults())
    assert [message["content"] for message in first.whole] == ["A barn.\n\nWhat?", "a barn", "Where?", "here"]
    assert texts_of(["coqa"], tmp_path, "assistant") == ["a barn", "here", "a cat"]
    _, said = preset_texts.documents_of("conversational", tmp_path)
    assert said == ["What?\n\na barn\n\nWhere?\n\nhere\n", "Who?\n\na cat\n"]


def test_misspelt_names_and_missing_folders_are_told_before_a_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", ask)
    monkeypatch.chdir(tmp_path)
    for name in ("smolm2", "SmolLM2", "smollm"):
        with pytest.raises(
            ValueError, match=rf"model must be a name that there is, got '{name}'. Did you mean smollm2"
        ):
            check_model(name)
    for name in ("teacher/", "./teacher", f"{tmp_path}/teacher", "runs/of/mine"):
        with pytest.raises(ValueError, match=r"teacher must be a folder with config\.json, got .*, which is not there"):
            check_model(name, "teacher")
    Path("teacher").mkdir()
    with pytest.raises(ValueError, match=r"got 'teacher', without one\. Name what save_pretrained has written"):
        check_model("teacher")
    Path("smollm").mkdir()
    (tmp_path / "smollm" / "config.json").write_text("{}")
    for name in ("gpt2", "owner/name", "smollm"):
        with pytest.raises(AssertionError, match="asked for"):
            check_model(name)
    for name, known in (("lamabda", "lambada"), ("coca", "coqa")):
        with pytest.raises(ValueError, match=f"text must be a name that there is, got '{name}'. Did you mean {known}"):
            check_text(name)
        Path(name).write_text("A text of that name.")
        check_text(name)
