"""The teacher store: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import dft_kernels
from dft_kernels.commands import main as cli
from dft_kernels.store.manifest import Contents
from dft_kernels.store.reader import Store
from dft_kernels.store.writer import StoreWriter

V, H, K = 70, 6, 5
LENGTHS = (3, 7, 2, 9, 4, 4, 1, 6)


def contents(kind: str, **changes: Any) -> Contents:
    plain = {"vocab_size": V, "width": H if kind == "hidden" else K, "model": "m", "model_sha256": "a"}
    return Contents(kind=kind, **{**plain, "tokenizer_sha256": "b", **changes})


def rows(kind: str, number: int, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens and rows of sequence `number`, the same at every call."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, V, (length,), generator=generator)
    if kind == "hidden":
        return tokens, {"hidden": torch.randn(length, H, generator=generator).bfloat16()}
    log_p = torch.randn(length, V, generator=generator).log_softmax(-1)
    top = log_p.topk(K)
    tail = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    return tokens, {"indices": top.indices, "log_probs": top.values.bfloat16(), "tail": tail}


def write(folder: Path, kind: str, lengths: tuple[int, ...] = LENGTHS, shard: int = 3) -> Path:
    head = (torch.randn(V, H).bfloat16(), None) if kind == "hidden" else None
    with StoreWriter(folder, contents(kind), head) as writer:
        for start in range(writer.sequences, len(lengths), shard):
            some = [rows(kind, n, lengths[n]) for n in range(start, min(len(lengths), start + shard))]
            names = some[0][1]
            writer.append(
                [tokens for tokens, _ in some], **{name: [found[name] for _, found in some] for name in names}
            )
    return folder


def assert_holds(store: Store, kind: str, lengths: tuple[int, ...] = LENGTHS) -> None:
    assert len(store) == len(lengths)
    assert store.rows == sum(lengths)
    for number in torch.randperm(len(lengths)).tolist():
        tokens, found = rows(kind, number, lengths[number])
        item = store[number]
        assert torch.equal(item["input_ids"], tokens)
        assert store.length(number) == len(tokens)
        for name, value in found.items():
            assert torch.equal(item[name], value)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    store = Store(write(tmp_path / "store", kind))
    assert_holds(store, kind)
    with pytest.raises(IndexError, match=r"sequence must lie in 0\.\.7, got 8"):
        store[8]
    batch = store.batch([3, 6])
    assert batch["labels"].tolist()[1][1:] == [-100] * 8
    assert batch["attention_mask"].sum(1).tolist() == [9, 1]
    hidden, weight = torch.randn(2, 9, 4, requires_grad=True), torch.randn(V, 4)
    loss = dft_kernels.linear_distribution_loss(
        hidden, weight, dft_kernels.shift_labels(batch["labels"]), store.teacher(batch, dtype=torch.float32)
    )
    loss.backward()
    assert torch.isfinite(loss)
    store.check_values()


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_workers_and_ranks_share_a_store(kind: str, tmp_path: Path) -> None:
    store = Store(write(tmp_path / "store", kind))
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(store, num_replicas=2, rank=rank, shuffle=True)  # type: ignore[var-annotated]
        loader = DataLoader(store, batch_size=2, sampler=sampler, collate_fn=store.collate, num_workers=2)
        for batch in loader:
            for row, number in enumerate(batch["sequence"].tolist()):
                seen.append(number)
                tokens, found = rows(kind, number, LENGTHS[number])
                assert torch.equal(batch["input_ids"][row, : len(tokens)], tokens)
                for name, value in found.items():
                    assert torch.equal(batch[name][row, : len(tokens)], value)
    assert sorted(seen) == list(range(len(LENGTHS)))


WRITES = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_store
print("ready", flush=True)
test_store.write(Path({folder!r}), "topk", test_store.MANY, shard=1)
"""
MANY = tuple(1 + n % 7 for n in range(400))


def test_killed_at_any_moment_it_goes_on_without_losing_or_repeating_a_row(tmp_path: Path) -> None:
    folder, kills = tmp_path / "store", 0
    code = WRITES.format(tests=str(Path(__file__).parent), folder=str(folder))
    generator = torch.Generator().manual_seed(0)
    while True:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.02 + 0.2 * float(torch.rand((), generator=generator)))
        if kills < 5:
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait(timeout=120) == 0
            break
        if (folder / "manifest.json").exists():
            whole = Store(folder)  # at every moment what is listed is there, and right
            assert_holds(whole, "topk", MANY[: len(whole)])
    assert kills == 5
    assert_holds(Store(folder), "topk", MANY)
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]


def test_killed_before_its_first_manifest_it_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "store", "hidden", LENGTHS[:0])
    (folder / "manifest.json").unlink()
    assert {path.name for path in folder.iterdir()} == {".lock", "head.safetensors"}
    with pytest.raises(
        ValueError, match=r"head.safetensors: the file must be none, or this capture's head, got another"
    ):
        write(folder, "hidden")
    with pytest.raises(ValueError, match=r"must be new, empty or a store, got \['head.safetensors'\]"):
        write(folder, "topk")
    torch.manual_seed(0)  # the head of the first
    assert_holds(Store(write(folder, "hidden")), "hidden")


def damage(folder: Path, what: str) -> None:
    shard, manifest = folder / "shard-00001.safetensors", folder / "manifest.json"
    whole = json.loads(manifest.read_text())
    if what == "truncated":
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size - 7)
    elif what == "edited":
        data = bytearray(shard.read_bytes())
        data[-3] ^= 1
        shard.write_bytes(bytes(data))
    elif what == "missing":
        shard.unlink()
    elif what == "swapped":
        shutil.copy(folder / "shard-00000.safetensors", shard)
        size = shard.stat().st_size
        whole["shards"][1].update(bytes=size, sha256=whole["shards"][0]["sha256"])
    elif what == "head":
        (folder / "head.safetensors").write_bytes(b"")
    elif what == "format":
        whole["format"] = "something"
    elif what == "version":
        whole["version"] = 2
    elif what == "kind":
        whole["kind"] = "logits"
    elif what == "field":
        del whole["vocab_size"]
    elif what == "width":
        whole["width"] = H + 1
    manifest.write_text(json.dumps(whole) if what != "json" else manifest.read_text()[:-30])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("truncated", r"shard-00001.safetensors: bytes must be \d+, got \d+"),
        ("edited", r"shard-00001.safetensors: sha256 must be [0-9a-f]{64}, got"),
        ("missing", r"shard-00001.safetensors: the file must be there"),
        ("swapped", r"shard-00001.safetensors: tokens must have shape \[17\], got \[12\]"),
        ("head", r"head.safetensors: bytes must be"),
        ("format", r"manifest.json: format must be"),
        ("version", r"manifest.json: version must be 1, got 2"),
        ("kind", r"manifest.json: kind must be one of hidden, topk"),
        ("field", r"manifest.json: vocab_size must be there, got none"),
        ("width", r"head.safetensors: weight must have shape \[70, 7\], got \[70, 6\]"),
        ("json", r"manifest.json: the file must be readable JSON"),
    ],
)
def test_damage_is_refused_by_file_and_field(what: str, said: str, tmp_path: Path, capsys: Any) -> None:
    folder = write(tmp_path / "store", "hidden")
    damage(folder, what)
    with pytest.raises(ValueError, match=said):
        Store(folder)
    assert cli.main(["store", "verify", str(folder)]) == 1
    assert "dft-kernels store: " in capsys.readouterr().err


def test_no_store_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest.json: the file must be there"):
        Store(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"must be new, empty or a store, got \['thesis.tex'\]"):
        write(tmp_path, "topk")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_writer_and_one_capture_a_store(tmp_path: Path) -> None:
    folder = write(tmp_path / "store", "topk")
    with (
        StoreWriter(folder, contents("topk")),
        pytest.raises(ValueError, match="must have one writer at a time"),
    ):
        StoreWriter(folder, contents("topk"))
    for change in ({"width": K + 1}, {"temperature": 2.0}, {"model_sha256": "c"}, {"vocab_size": V + 1}):
        (field,) = change
        with pytest.raises(ValueError, match=f"manifest.json: {field} must be .* as in this capture"):
            StoreWriter(folder, contents("topk", **change))
    found = {name: [value] for name, value in rows("topk", 0, 2)[1].items()}
    found["tail"] = [torch.zeros(3)]
    with (
        StoreWriter(folder, contents("topk")) as writer,
        pytest.raises(ValueError, match=r"tail must have shape \[2\]"),
    ):
        writer.append([torch.zeros(2)], **found)
    assert_holds(Store(folder), "topk")  # nothing was lost


def test_shifted_tokens_are_refused(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "store", "topk"))
    ids = store.batch([1, 3])["input_ids"]
    store.batch([1, 3], ids)
    with pytest.raises(
        ValueError, match=r"shard-00000.safetensors: tokens must hold .*sequence 1 has \d+ at position 0"
    ):
        store.batch([1, 3], ids.roll(1, dims=1))
    with pytest.raises(ValueError, match=r"input_ids must have shape \[2, at least 9\]"):
        store.batch([1, 3], ids[:, 1:])


def test_rows_that_no_capture_writes(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "store"
    tokens, found = rows("topk", 0, 4)
    found["indices"][2, 1] = found["indices"][2, 0]
    with StoreWriter(folder, contents("topk")) as writer:
        writer.append([tokens], **{name: [value] for name, value in found.items()})
    assert cli.main(["store", "verify", str(folder)]) == 1
    assert "log_probs must be of distinct ids and sum to 1 with tail, got row 2" in capsys.readouterr().err


def test_info(tmp_path: Path, capsys: Any) -> None:
    folder = write(tmp_path / "store", "topk")
    assert cli.main(["store", "info", str(folder)]) == 0
    assert cli.main(["store", "verify", str(folder)]) == 0
    said = capsys.readouterr().out
    size = sum(os.path.getsize(path) for path in folder.glob("shard-*")) / sum(LENGTHS)
    assert f"8 sequences, {sum(LENGTHS)} tokens in 3 files" in said
    assert f"{size:,.0f} bytes a token" in said
    assert "every checksum" in said
