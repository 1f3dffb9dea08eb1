"""A capture over several machines: shards, each a part of the sequences, and the one store that they make."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, far, word_tokenizer

from dft_kernels.commands import main as cli
from dft_kernels.store.fingerprint import sequences_fingerprint
from dft_kernels.store.join import join
from dft_kernels.store.manifest import read_manifest, write_manifest
from dft_kernels.store.reader import Store
from dft_kernels.training.capture import capture
from dft_kernels.training.shares import share_range, windows

LENGTHS = torch.randint(1, 12, (60,), generator=torch.Generator().manual_seed(3)).tolist()
SEQUENCES = [torch.randint(4, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
COUNTS = [torch.arange(n) % 3 > 0 for n in LENGTHS]
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
OPTIONS: dict[str, Any] = {"k": 5, "batch_tokens": 30, "shard_rows": 25}


def captured(folder: Path, words: Any, shard: tuple[int, int] | None = None, kind: str = "topk", **more: Any) -> Path:
    sequences = more.pop("sequences", SEQUENCES)
    capture(more.pop("teacher", None) or far(), words, sequences, folder, kind, shard=shard, **{**OPTIONS, **more})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards 0 to 2 of 3, and the whole, of kind topk."""
    at, words = tmp_path_factory.mktemp("shards"), word_tokenizer(VOCABULARY)
    for index in range(3):
        captured(at / f"{index}", words, (index, 3))
    captured(at / "whole", words)
    return at


@pytest.fixture
def words() -> Any:
    return word_tokenizer(VOCABULARY)


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> list[Path]:
    """The shards, as copies to be spoilt."""
    return [Path(shutil.copytree(made / f"{index}", tmp_path / f"{index}")) for index in range(3)]


def as_said(folder: Path, **changes: Any) -> None:
    """Change what a shard's manifest says of its share."""
    found = read_manifest(folder)
    assert found.share is not None
    write_manifest(folder, found._replace(share=replace(found.share, **changes)))


# ---- which sequences are whose


@pytest.mark.parametrize("of", [1, 2, 3, 7, 13])
def test_shares_are_ranges_of_nearly_equal_tokens(of: int) -> None:
    rows = 25
    assert len(list(windows(LENGTHS, 0, rows))) >= 13
    shares = [share_range(LENGTHS, rows, (index, of)) for index in range(of)]
    assert [number for numbers, _ in shares for number in numbers] == list(range(60))
    starts = [window.start for window in windows(LENGTHS, 0, rows)]
    assert [numbers.start for numbers, _ in shares] == [starts[file] for _, file in shares]
    tokens = [sum(LENGTHS[number] for number in numbers) for numbers, _ in shares]
    assert max(abs(one - sum(LENGTHS) / of) for one in tokens) <= rows + max(LENGTHS)


def test_one_long_sequence_leaves_a_file_for_each() -> None:
    lengths = [1, 1, 1, 1000, 1]
    assert [share_range(lengths, 1, (index, 4))[0] for index in range(4)] == [
        range(2), range(2, 3), range(3, 4), range(4, 5)
    ]  # fmt: skip


def test_a_shard_that_cannot_be(tmp_path: Path, words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for shard, said in (
        ((3, 3), r"capture: shard must be \(i, n\) with i in 0..n-1, counted from 0, got \(3, 3\). The last of 3 is 2"),
        ((-1, 3), "got \\(-1, 3\\)"),
        ((0, 99), "shard must have a file for each of its n parts, got 99 for 1. files of 25 tokens. Lower shard_rows"),
    ):
        with pytest.raises(ValueError, match=said):
            captured(tmp_path / "new", words, shard)
    line = ["capture", "--model", "m", "--text", __file__, "--out", str(tmp_path / "new"), "--shard", "4/4"]
    assert cli.main(line) == 2
    said = (
        "--shard must be I/N with I in 0..N-1, counted from 0 as ranks are, got '4/4'. Write one: of 4 the first is 0/4"
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- the store of all shards


@pytest.mark.parametrize(("kind", "masked"), [("hidden", False), ("topk", True)])
def test_joined_it_is_the_store_of_one_machine(kind: str, masked: bool, tmp_path: Path, words: Any) -> None:
    more: dict[str, Any] = {"kind": kind, "counts": COUNTS if masked else None}
    whole = Store(captured(tmp_path / "whole", words, **more), words)
    folders = [captured(tmp_path / f"{index}", words, (index, 4), **more) for index in (2, 0, 3, 1)]
    before = [files(folder) for folder in folders]
    told: list[int] = []
    joined = join(tmp_path / "joined", folders, told.append)
    assert len(joined) == len(whole) == 60
    for number in range(60):
        for name, value in whole[number].items():
            assert torch.equal(joined[number][name], value), (number, name)
        assert torch.equal(joined[number]["input_ids"], SEQUENCES[number])
    assert files(joined.folder) == files(whole.folder)  # the manifest too
    assert [files(folder) for folder in folders] == before
    assert sum(told) == sum(len(data) for name, data in files(whole.folder).items() if name.endswith(".safetensors"))
    ticks: list[int] = []
    captured(joined.folder, words, tick=ticks.append, **more)  # the capture goes on from it: nothing is to be done
    assert ticks == [sum(LENGTHS)]


def test_files_are_links_or_copies(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [made / f"{index}" for index in range(3)]
    linked = join(tmp_path / "linked", folders)
    part = linked.parts[0].file
    assert (linked.folder / part).samefile(folders[0] / part)

    def none(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", none)
    copied = join(tmp_path / "copied", folders)
    assert not (copied.folder / part).samefile(folders[0] / part)
    assert files(copied.folder) == files(linked.folder) == files(made / "whole")


def test_a_shard_is_a_store_of_its_sequences(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = Store(made / "1")
    share = store.share
    assert share is not None
    assert torch.equal(store[0]["input_ids"], SEQUENCES[share.first])
    assert cli.main(["store", "verify", str(made / "1")]) == 0
    said = capsys.readouterr().out
    assert f"shard      1/3: sequences {share.first} to {share.first + share.sequences - 1} of 60, all of them" in said
    assert cli.main(["store", "join", str(tmp_path / "out"), *(str(made / f"{index}") for index in (1, 0, 2))]) == 0
    said = capsys.readouterr().out
    assert "holds      60 sequences" in said
    assert "joined of 3 shards; every checksum is as it was written" in said
    assert "shard  " not in said


def test_training_asks_for_the_whole(made: Path, tmp_path: Path, words: Any, capsys: Any) -> None:
    far().save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    line = ["train", "--model", str(tmp_path / "model"), "--teacher", str(made / "1"), "--use_cpu"]
    assert cli.main([*line, "--output_dir", str(tmp_path / "out")]) == 1
    assert "--teacher must be a whole store, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- what does not belong together


def test_a_shard_goes_on_as_itself_alone(made: Path, words: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "1", tmp_path / "s"))
    manifest = (folder / "manifest.json").read_bytes()
    captured(folder, words, (1, 3))
    for shard, more, said in (
        (None, {}, "manifest.json: share must be a whole store as in this capture, got shard 1/3. Name another"),
        ((1, 4), {}, "share must be shard 1/4 as in this capture, got shard 1/3"),
        ((1, 3), {"sequences": [*SEQUENCES[:-1], SEQUENCES[-1].flip(0)]}, "share.sha256 must be .* Give the texts"),
        ((1, 3), {"shard_rows": 27}, "share.(first|sequences|shard_rows) must be "),
    ):
        with pytest.raises(ValueError, match=said):
            captured(folder, words, shard, **more)
    with pytest.raises(ValueError, match=r"share must be shard 0/3 as in this capture, got a whole store"):
        captured(made / "whole", words, (0, 3))
    assert (folder / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("take", "said"),
    [
        ([0, 2], r"join: shards must hold all 60 sequences, got sequences \d+ to \d+ in none; no shard 1/3. Name the"),
        ([0, 1], r"sequences \d+ to 59 in none; no shard 2/3"),
        ([2], r"sequences 0 to \d+ in none; no shard 0/3, 1/3"),
        (
            [0, 1, 1, 2],
            r"must hold each sequence once, got sequences \d+ to \d+ in \S+/1 \(shard 1/3\) and in \S+/1 \(",
        ),
        (["whole"], r"must be of dft-kernels capture --shard, got \S+/whole, a whole store. Leave it out"),
        ([], "must be at least one folder, got none"),
    ],
)
def test_not_all_shards_once(take: list[Any], said: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        join(tmp_path / "out", [made / f"{name}" for name in take])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"shard": (1, 2)}, r"must be of one capture, got share.of 3 in \S+/0 and 2 in \S+/other. Capture one again"),
        ({"k": 4}, "width 5 in .* and 4 in"),
        ({"temperature": 2.0}, "temperature 1.0 in .* and 2.0 in"),
        ({"vocab_size": 95}, "vocab_size 100 in .* and 95 in"),
        ({"teacher": far(final_logit_softcapping=None, tie_word_embeddings=True)}, "model_sha256 '.*' in"),
        ({"shard_rows": 24}, "share.shard_rows 25 in .* and 24 in"),
        ({"sequences": SEQUENCES[::-1]}, "share.sha256 '.*' in .* and '.*' in"),
        ({"counts": COUNTS}, "masked False in .* and True in"),
    ],
)
def test_a_shard_of_another_capture(
    more: dict[str, Any], said: str, made: Path, words: Any, tmp_path: Path
) -> None:  # fmt: skip
    other = captured(tmp_path / "other", words, **{"shard": (1, 3), **more})
    with pytest.raises(ValueError, match=said):
        join(tmp_path / "out", [made / "0", other, made / "2"])
    assert not (tmp_path / "out").exists()


def test_the_teacher_may_have_another_name_elsewhere(made: Path, words: Any, tmp_path: Path) -> None:
    """Its folder on that machine; the join's is that of the first shard."""
    other = captured(tmp_path / "other", words, (1, 3), name="/elsewhere/model")
    joined = join(tmp_path / "out", [other, made / "0", made / "2"])
    assert joined.contents == Store(made / "whole").contents
    assert files(joined.folder) == files(made / "whole")


def test_a_served_teacher_is_known_by_its_name(shards: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(shards):
        found = json.loads((folder / "manifest.json").read_text())
        found |= {"model_sha256": None, "server": "vllm 0.32.0", "model": f"checkpoint-{number // 2}"}
        (folder / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"of one capture, got model 'checkpoint-0' in .* 'checkpoint-1'"):
        join(tmp_path / "out", shards)


def test_the_digest_tells_lists_apart() -> None:
    lists = [[[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]], [[1, 2], [4]], []]
    found = {sequences_fingerprint([torch.tensor(ids) for ids in one]) for one in lists}
    ids = [torch.tensor([1, 2]), torch.tensor([3])]
    for marks in ([[1, 1], [1]], [[0, 1], [1]]):
        found.add(sequences_fingerprint(ids, [torch.tensor(one) == 1 for one in marks]))
    assert len(found) == len(lists) + 2


def test_a_shard_of_another_tokenizer(made: Path, words: Any, tmp_path: Path) -> None:
    words.add_tokens(["another"])
    other = captured(tmp_path / "other", words, (1, 3))
    with pytest.raises(ValueError, match=r"must be of one capture, got tokenizer_sha256 '.*' in .* and '.*' in"):
        join(tmp_path / "out", [made / "0", other, made / "2"])


def test_an_unfinished_shard_is_named(
    made: Path, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def stop(tokens: int) -> None:
        seen.append(tokens)
        if sum(seen) > 60:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        captured(tmp_path / "part", words, (1, 3), tick=stop)
    part = Store(tmp_path / "part")
    assert part.share is not None
    lack = part.share.sequences - len(part)
    assert 0 < lack < part.share.sequences
    assert cli.main(["store", "info", str(part.folder)]) == 0
    assert f"of 60, of which it lacks {lack}\n" in capsys.readouterr().out
    line = ["store", "join", str(tmp_path / "out"), str(made / "0"), str(part.folder), str(made / "2")]
    assert cli.main(line) == 1
    relation = (
        f"must be finished, got {part.folder} (shard 1/3), which lacks {lack} of {part.share.sequences} sequences"
    )
    assert capsys.readouterr().err == f"dft-kernels store: DIR {relation}. Run the same capture again: it goes on.\n"
    captured(tmp_path / "part", words, (1, 3))
    assert cli.main(line) == 0
    assert files(tmp_path / "out") == files(made / "whole")


def test_manifests_that_claim_what_is_not_so(shards: list[Path], tmp_path: Path) -> None:
    share = read_manifest(shards[1]).share
    assert share is not None
    as_said(shards[1], first=share.first - 2, whole=60)
    with pytest.raises(ValueError, match=f"sequences {share.first - 2} to {share.first - 1} in .* and in .*shard 1/3"):
        join(tmp_path / "out", shards)
    as_said(shards[1], first=share.first + 1)
    with pytest.raises(ValueError, match=f"got sequences {share.first} to {share.first} in none. Name"):
        join(tmp_path / "out", shards)
    as_said(shards[1], first=share.first)
    found = read_manifest(shards[1])
    found.parts[0] = replace(found.parts[0], file=read_manifest(shards[0]).parts[0].file)
    shutil.copy(shards[1] / f"shard-{share.file:05d}.safetensors", shards[1] / found.parts[0].file)
    write_manifest(shards[1], found)
    with pytest.raises(
        ValueError, match=r"must have files of different names, got shard-00000.safetensors in .*/0 and"
    ):
        join(tmp_path / "out", shards)
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_a_file_has_its_name(shards: list[Path], made: Path, tmp_path: Path) -> None:
    file = next(shards[2].glob("shard-*"))
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"store: {file}: sha256 must be [0-9a-f]+, got .* capture this shard again"):
        join(tmp_path / "out", shards)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"manifest.json", file.name} & left
    assert not [name for name in left if name.endswith(".part")]
    file.write_bytes(right)
    join(tmp_path / "out", shards)
    assert files(tmp_path / "out") == files(made / "whole")
    join(tmp_path / "out", shards)  # it is there


def test_folders_that_are_no_place_for_it(shards: list[Path], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="out must be none of the shards"):
        join(shards[0], shards)
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"out must be new, empty or of the same join, got .*\['thesis.tex'\]"):
        join(out, shards)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").rename(out / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"got another shard-00000.safetensors in"):
        join(out, shards)
    assert (out / "shard-00000.safetensors").read_text() == "x"
    shutil.rmtree(out)
    whole = json.loads((made / "whole/manifest.json").read_text())
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({**whole, "model": "another"}))
    with pytest.raises(ValueError, match=r"which holds another store. Name another folder"):
        join(out, shards)


def test_what_a_stopped_join_left_is_no_way_into_a_shard(
    shards: list[Path], tmp_path: Path, words: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be a link to a shard's file: a capture into that folder leaves the shards as they are."""
    out, before = tmp_path / "out", [files(folder) for folder in shards]

    def stop(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("dft_kernels.store.join.digest", stop)
        assert cli.main(["store", "join", str(out), *map(str, shards)]) == 130
    assert capsys.readouterr().err == f"dft-kernels store: stopped; the same command goes on in {out}\n"
    (left,) = out.glob("*.part")
    assert left.samefile(shards[0] / "shard-00000.safetensors")
    captured(out, words)
    assert [files(folder) for folder in shards] == before


def test_what_a_killed_capture_was_writing_is_gone(made: Path, tmp_path: Path, words: Any) -> None:
    """safetensors writes under a name of its own first."""
    for begun in (True, False):
        out = tmp_path / f"{begun}"
        if begun:
            shutil.copytree(made / "whole", out)
        (out / ".writing").mkdir(parents=True)
        (out / ".writing" / ".tmpZuwrEi").write_bytes(b"half of a file")
        assert files(captured(out, words)) == files(made / "whole")
