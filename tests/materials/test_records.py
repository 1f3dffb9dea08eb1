"""Records as people have them: what is read, from where, and what is said of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dft_kernels.materials.records import Document, Faults, documents, structured
from dft_kernels.materials.sources import check_text, passages_of, texts_of

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good morning."}]
ROWS: list[dict[str, Any]] = [
    {"text": "A tale."},
    {"prompt": "One and", "completion": " two."},
    {"prompt": CHAT[:1], "completion": CHAT[1:], "tools": [{"name": "clock"}]},
    {"messages": CHAT, "text": "not this"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "In "}, {"type": "text", "text": "parts."}]}]},
]
READ = [
    ("A tale.", None, None),
    (" two.", "One and", None),
    (CHAT[1:], CHAT[:1], [{"name": "clock"}]),
    (CHAT, None, None),
    (ROWS[4]["messages"], None, None),
]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


def read(name: str, skip: bool = False) -> tuple[list[Document], Faults]:
    faults = Faults(skip)
    return list(documents([name], faults)), faults


def test_lines(tmp_path: Path) -> None:
    name = lines(tmp_path / "a.jsonl", ROWS)
    found, _ = read(name)
    assert [(one.whole, one.before, one.tools) for one in found] == READ
    assert [one.where for one in found] == [f"{name}, line {number}" for number in range(1, 6)]
    assert structured(name)
    check_text(name)
    said = ["A tale.", "One and two.", "Hello?", "Good morning.", "Hello?", "Good morning.", "In parts."]
    assert texts_of([name], tmp_path) == said
    assert texts_of([name], tmp_path, "assistant") == ["Good morning.", "Good morning."]
    assert texts_of([name], tmp_path, "completion") == [" two.", "Good morning."]
    assert [part.strip() for part in passages_of([name], tmp_path)] == said


@pytest.mark.parametrize("form", ["parquet", "saved", "splits"])
def test_tables(form: str, tmp_path: Path) -> None:
    """Parquet fills what a row has not with None, in messages too."""
    datasets = pytest.importorskip("datasets")  # which comes with TRL, from Python 3.11 on
    chats = [[*CHAT, {"role": "tool", "content": None, "name": "clock"}], CHAT[:1]]
    table = datasets.Dataset.from_dict({"messages": chats, "text": [None, "x"]})
    name = str(tmp_path / ("a.parquet" if form == "parquet" else "folder"))
    if form == "parquet":
        table.to_parquet(name)
    else:
        (table if form == "saved" else datasets.DatasetDict(train=table, test=table.select([0]))).save_to_disk(name)
    assert structured(name)
    check_text(name)
    found, _ = read(name)
    assert [one.whole for one in found] == [[*CHAT, {"role": "tool", "name": "clock"}], CHAT[:1]]
    assert found[1].where == f"{name}, row 2"
    if form == "splits":
        datasets.DatasetDict(other=table).save_to_disk(tmp_path / "more")
        with pytest.raises(ValueError, match="must have a split train, got other"):
            read(str(tmp_path / "more"))


BAD = [
    (b'{"text": "x"', "be JSON, got Expecting"),
    (b'{"text": "\xff"}', "be UTF-8 text, got 'utf-8' codec can't decode byte 0xff"),
    (rb'{"text": "\ud800"}', "be UTF-8 text, got 'utf-8' codec can't encode character"),
    (b"[" * 100_000, "be JSON, got"),
    (b"[1, 2]", r"be an object of columns, got \[1, 2\]"),
    (b'{"story": "x", "id": 3}', "have messages, prompt and completion, or text, got columns story, id"),
    (b'{"prompt": "x"}', "have messages, prompt and completion, or text, got columns prompt"),
    (b'{"text": " "}', "have a text that is not empty"),
    (b'{"text": 7}', "have a text as its text, got 7"),
    (b'{"messages": []}', r"have messages \[\{role, content\}, ...\] as its messages, got \[\]"),
    (b'{"messages": [{"content": "x"}]}', "as its messages, got"),
    (b'{"messages": "x"}', "as its messages, got 'x'|as its messages, got x"),
    (b'{"prompt": "x", "completion": ""}', "have a completion that is not empty"),
    (b'{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}', "a completion of one kind"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_a_bad_line_is_named_or_counted(line: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    with pytest.raises(ValueError, match=rf"^materials: .*a.jsonl, line 2: a record must .*{said}") as raised:
        read(str(file))
    assert str(raised.value).endswith(".")
    found, faults = read(str(file), skip=True)
    assert [one.whole for one in found] == ["good", "too"]
    assert sum(faults.skipped.values()) == 1


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must name readable files, got .*none.jsonl: No such file"):
        check_text(str(tmp_path / "none.jsonl"))
    pytest.importorskip("datasets")  # which comes with TRL, from Python 3.11 on
    for name, said in (
        ("a.parquet", "must name readable parquet files"),
        ("folder", "must name a folder of datasets.save_to_disk"),
    ):
        with pytest.raises(ValueError, match=said):
            check_text(str(tmp_path / name))
