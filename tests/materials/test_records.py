"""Records as people have them: what is read, from where, and what is said of what cannot be."""

from __future__ import annotations

import array
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


def test_messages_without_a_content(tmp_path: Path) -> None:
    """A call of a tool stands for it, whether content is null or not there."""
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
    name = lines(
        tmp_path / "a.jsonl", [{"messages": [CHAT[0], call]}, {"messages": [CHAT[0], {**call, "content": None}]}]
    )
    assert [one.whole for one in read(name)[0]] == [[CHAT[0], call]] * 2


def test_a_mark_of_the_order_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "A tale."}\r\n{"text": "Two."}')
    assert [one.whole for one in read(str(tmp_path / "a.jsonl"))[0]] == ["A tale.", "Two."]


def test_broken_utf8_in_parquet(tmp_path: Path) -> None:
    """One row's is that row's fault."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ends, data = (arrow.py_buffer(array.array("i", [0, 3, 5, 8]).tobytes()), arrow.py_buffer(b"one\xff\xfetwo"))
    table = arrow.table({"text": arrow.StringArray.from_buffers(3, ends, data)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2: a record must be UTF-8 text, got 'utf-8' codec"):
        read(str(tmp_path / "a.parquet"))
    found, faults = read(str(tmp_path / "a.parquet"), skip=True)
    assert [one.whole for one in found] == ["one", "two"]
    assert faults.said() == ["1 records are left out: they must be UTF-8 text"]


def test_names_of_datasets(tmp_path: Path) -> None:
    """Streamed by the library itself, here from a folder: split, column, and what cannot be read."""
    pytest.importorskip("datasets")
    for folder, rows in {"good": ROWS[:1] * 3, "broken": []}.items():
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "train.jsonl", [{"text": "A tale.", "other": "Another."} for _ in rows])
    (tmp_path / "broken" / "train.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff\xfe"}\n')
    name = f"hf:{tmp_path / 'good'}"
    assert structured(name)
    assert [(one.where, one.whole) for one in read(name)[0]][2:] == [(f"{name}, row 3", "A tale.")]
    assert [one.whole for one in read(f"{name}:train:other")[0]] == ["Another."] * 3
    for bad, said in {
        f"{name}:test": "must be a dataset that has a split 'test', got: Bad split: test",
        f"{name}:train:none": r"must have a column 'none', got \['text', 'other'\]",
        "hf:": r"must be hf:NAME\[:SPLIT\[:COLUMN\]\], got hf:",
        f"hf:{tmp_path / 'broken'}": r"must name datasets that can be read, got hf:\S+broken: after row \d: 'utf-8'",
    }.items():
        with pytest.raises(ValueError, match=f"^materials: text.*{said}"):
            read(bad)


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
        with pytest.raises(
            ValueError, match=r"must name a folder with a split train, got \S+more with other\. Name \S+more.SPLIT\."
        ):
            read(str(tmp_path / "more"))


BAD = [
    (b'{"text": "x"', "be JSON, got Expecting"),
    (b'{"text": "\xff"}', "be UTF-8 text, got 'utf-8' codec can't decode byte 0xff"),
    (rb'{"text": "\ud800"}', "be UTF-8 text, got 'utf-8' codec can't encode character"),
    (b"[" * 100_000, "be JSON, got"),
    (b"[1, 2]", r"be an object of columns, got \[1, 2\]"),
    (b'{"story": "x", "id": 3}', "have messages, prompt and completion, or text, got columns story, id"),
    (b'{"prompt": "x"}', "have messages, prompt and completion, or text, got columns prompt"),
    (b'{"text": " "}', "have a text that is not empty, got ' '. Leave it out"),
    (b'{"text": 7}', "have a text as its text, got 7"),
    (b'{"messages": []}', r"have messages \[\{role, content\}, ...\] as its messages, got \[\]"),
    (b'{"messages": [{"content": "x"}]}', "as its messages, got"),
    (b'{"messages": [{"role": "user", "content": 5}]}', "as its messages, got .*5"),
    (b'{"messages": [{"role": "user", "content": [1]}]}', "as its messages, got .*1"),
    (b'{"messages": [{"role": "assistant", "content": null}]}', "as its messages, got .*None"),
    (b'{"messages": "x"}', "as its messages, got 'x'|as its messages, got x"),
    (b'{"text": "x", "tools": "["}', "have tools that are JSON, got Expecting value"),
    (b'{"text": "x", "tools": {"a": 1}}', "have a list as its tools, got {'a': 1}"),
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
    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    with pytest.raises(ValueError, match=r"text must be text or records, got .*a.json. Write its rows into .jsonl"):
        check_text(str(tmp_path / "a.json"))
    pytest.importorskip("datasets")  # which comes with TRL, from Python 3.11 on
    for name, said in (
        ("a.parquet", "must name readable parquet files"),
        ("folder", "must name a folder of datasets.save_to_disk"),
    ):
        with pytest.raises(ValueError, match=said):
            check_text(str(tmp_path / name))
