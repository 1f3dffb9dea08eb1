"""Every reader of the package against damaged and hostile files: what is wrong with the file, in the one form of our
errors, or the content that the file holds; no other exception, no warning, within a second and 200 MB."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from reader_files import FIRST, READERS, Tiny, V, bytewise, make_store, make_target, metadata_of, parse, read_store

from dft_kernels.benchmarks import tables
from dft_kernels.files import Source
from dft_kernels.materials.models import read_texts
from dft_kernels.materials.sources import ABOUT, passages_of, read_about
from dft_kernels.models.correction import CORRECTION_FILE, load_correction
from dft_kernels.store.reader import Store
from dft_kernels.targets import target_file
from dft_kernels.terms import Delayed, TokenL2
from dft_kernels.training.progress import TERMS_FILE, load_terms

OURS = re.compile(r"[\w.]+: .+ must .+, got .+\. .+[.?]", re.S)
FEW, MANY = 100, 2000


def listed_again(folder: Path, name: str) -> None:
    """A manifest that lists a changed file with its new size and checksum, so that only its content is wrong."""
    manifest = folder / "manifest.json"
    whole, data = json.loads(manifest.read_text()), (folder / name).read_bytes()
    for part in [whole["head"], *whole["shards"]]:
        if part is not None and part["file"] == name:
            part.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.write_text(json.dumps(whole))


def peak() -> int:
    """The most bytes of memory that this process has held since `Path("/proc/self/clear_refs")` was written."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def outcome(read: Callable[[Path], None], folder: Path, what: str) -> bool:
    """Whether a folder was read; False where it was refused in our form. Anything else fails."""
    started, said = time.process_time(), None
    try:
        read(folder)
    except ValueError as error:
        said = error
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert time.process_time() - started < 1, what
    if said is None:
        return True
    assert type(said) is ValueError, f"{what}: {said!r}"
    assert OURS.fullmatch(str(said)), f"{what}: {str(said)[:500]}"
    size = len(str(said).encode())  # which encodes; a configuration's own text of 5,000 letters may be in it
    assert size < 8000, what
    return False


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", READERS)
def test_changed_files(name: str, count: int, tmp_path: Path) -> None:
    reader = READERS[name]
    reader.make(tmp_path)
    reader.read(tmp_path)
    right = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    Path("/proc/self/clear_refs").write_text("5")
    before, refused = peak(), 0
    for seed in range(count):
        chance = random.Random(f"{name} {seed}")
        file = chance.choice(list(reader.files))
        change = bytewise if chance.random() < 0.4 else reader.files[file]
        (tmp_path / file).write_bytes(change(right[file], chance))
        if "store" in name and file != "manifest.json" and chance.random() < 0.7:
            listed_again(tmp_path, file)
        refused += not outcome(reader.read, tmp_path, f"{name}, seed {seed}, {file}")
        for written in (file, *({"manifest.json"} & right.keys())):
            (tmp_path / written).write_bytes(right[written])
    assert peak() - before < 200e6
    assert refused > count // 3
    reader.read(tmp_path)


# ---- files that are no files, names that leave the folder, sizes that are claims


def refused(read: Callable[[], Any], said: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=said) as caught:
        read()
    assert OURS.fullmatch(str(caught.value)), caught.value
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("manifest.json", Store),
        ("head.safetensors", Store),
        ("shard-00000.safetensors", Store),
        ("t.safetensors", lambda folder: target_file.load(folder / "t.safetensors")),
        (CORRECTION_FILE, lambda folder: load_correction(Tiny(), folder / CORRECTION_FILE)),
        ("bench.csv", lambda folder: tables.read(folder / "bench.csv")),
        ("job.yaml", lambda folder: parse([str(folder / "job.yaml")])),
        (ABOUT, lambda folder: read_about("sample", folder)),
        (TERMS_FILE, lambda folder: load_terms(str(folder), {"term": Delayed(TokenL2(torch.ones(4) / 4))})),
        ("text", lambda folder: read_texts([folder / "text"])),
        ("text", lambda folder: list(passages_of([str(folder / "text")], folder))),
    ],
)
@pytest.mark.parametrize("what", ["a folder", "a pipe", "a device"])
def test_what_is_no_regular_file_is_not_opened(
    file: str, read: Callable[[Path], Any], what: str, tmp_path: Path
) -> None:
    if (file, what) == ("text", "a pipe"):  # <(command) as a text that the user names: read to its end
        os.mkfifo(tmp_path / file)
        with ThreadPoolExecutor(1) as pool:
            pool.submit((tmp_path / file).write_text, "some words\n")
            assert read(tmp_path) == ["some words\n"]
        return
    make_store("hidden")(tmp_path)
    path = tmp_path / file
    path.unlink(missing_ok=True)
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{file}.*({what}|a link)"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../other/shard-00000.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "shard\0", "C:shard", "con",
        "nul.safetensors", "-shard", ".hidden", "x" * 300, "sh\ud800", 5, None, True, ["shard-00000.safetensors"],
    ],
)  # fmt: skip
def test_names_stay_in_their_folder(name: Any, tmp_path: Path) -> None:
    make_store("topk")(tmp_path / "store")
    make_store("topk")(tmp_path / "other")
    manifest = tmp_path / "store" / "manifest.json"
    whole = json.loads(manifest.read_text())
    whole["shards"][0]["file"] = name
    manifest.write_text(json.dumps(whole))
    refused(lambda: Store(tmp_path / "store", verify=False), r"manifest.json: shards\[0\].file must be (a plain|text)")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps({"model": "m", "text": ["lambada"], "teacher": name, "use_cpu": True}))
    if "\0" not in name:
        assert parse([str(file)])[0].teacher == name
    refused(lambda: target_file.load(name), "the file must be there, or be a preset")
    refused(lambda: Store(name), "manifest.json: the file must be a readable")
    refused(lambda: tables.read(Path(name)), "the file must be a readable")
    assert read_about("sample", Path(name)) == (None, {})


def test_links(tmp_path: Path) -> None:
    make_store("topk")(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.safetensors"
    moved = shard.rename(tmp_path / "store" / "moved")
    shard.symlink_to("moved")
    (tmp_path / "beside").symlink_to("store")
    read_store(tmp_path / "beside")  # a link to the folder, and one within it
    shard.unlink()
    shard.symlink_to(moved.rename(tmp_path / "outside"))
    refused(lambda: Store(tmp_path / "store"), r"shards\[1\].file must name a file of the folder, got .* a link to")
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(lambda: Store(tmp_path / "store"), r"the file must be (there|a readable)")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("vocab_size", -1, r"vocab_size must be an int of at least 1 and at most 2\.14748e\+09, got -1"),
        ("vocab_size", 20.0, r"vocab_size must be an int .*, got 20\.0"),
        ("vocab_size", True, "vocab_size must be an int .*, got True"),
        ("vocab_size", 10**30, "vocab_size must be an int"),
        ("width", V + 1, "width must be at most vocab_size, 20, of kind topk, got 21"),
        ("temperature", 0, "temperature must be a finite number"),
        ("temperature", float("nan"), "temperature must be a finite number .*, got nan"),
        ("logit_scale", float("inf"), "logit_scale must be a finite number, got inf"),
        ("softcap", "1", "softcap must be a finite number .*, got '1'"),
        ("model", 5, "model must be text, got 5"),
        ("shards", {}, "shards must be a list, got {}"),
        ("head", {}, "head must be a file of kind hidden"),
        ("format", [[[[]]]], "format must be 'dft_kernels teacher store'"),
        ("version", True, "version must be an int"),
        ("more", 1, "'more' must be one of kind, vocab_size"),
    ],
)
def test_fields_of_a_manifest(field: str, value: Any, said: str, tmp_path: Path) -> None:
    make_store("topk")(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), field: value}))
    refused(lambda: Store(tmp_path, verify=False), f"manifest.json: {said}")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rows", 2**52, r"tokens must have shape \[4503599627370496\], got \[5\]"),
        ("rows", -1, r"manifest.json: shards\[0\].rows must be an int of at least 0"),
        ("sequences", 6, r"shards\[0\].sequences must be at most its rows, 5, got 6"),
        ("bytes", 1.0, r"shards\[0\].bytes must be an int"),
        ("sha256", "0", r"shards\[0\].sha256 must be 64 hexadecimal digits, got '0'"),
        ("file", "shard-00001.safetensors", "must be of one shard, got shard-00001.safetensors 2 times"),
        ("file", "absent.safetensors", "absent.safetensors: the file must be there, got none"),
    ],
)
def test_fields_of_a_shard(field: str, value: Any, said: str, tmp_path: Path) -> None:
    make_store("topk")(tmp_path)
    manifest = tmp_path / "manifest.json"
    whole = json.loads(manifest.read_text())
    whole["shards"][0][field] = value
    manifest.write_text(json.dumps(whole))
    refused(lambda: Store(tmp_path, verify=False), said)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("index", 2, "share.index must be below share.of, 2, got 2"),
        ("of", 0, "share.of must be an int of at least 1"),
        ("first", 4, r"share.first \+ share.sequences must be at most share.whole, 6, got 4 \+ 3"),
        ("sequences", 2, "share.sequences must be at least the 3 that shards hold, got 2"),
        ("sha256", "0" * 63, "share.sha256 must be 64 hexadecimal digits"),
        ("whole", True, "share.whole must be an int of at least 0"),
        ("more", 1, "share.'more' must be one of index, of, first"),
    ],
)
def test_fields_of_a_share(field: str, value: Any, said: str, tmp_path: Path) -> None:
    make_store("topk", FIRST)(tmp_path)
    manifest = tmp_path / "manifest.json"
    whole = json.loads(manifest.read_text())
    whole["share"][field] = value
    manifest.write_text(json.dumps(whole))
    refused(lambda: Store(tmp_path, verify=False), f"manifest.json: {said}")
    manifest.write_text(json.dumps({**whole, "share": None}))
    refused(lambda: Store(tmp_path, verify=False), "manifest.json: share must be an object, got None")


def test_large_claims(tmp_path: Path) -> None:
    """A hundred thousand brackets, a text twice over, and sizes that no memory holds."""
    file = Source("store", tmp_path / "x.json", "Restore it")
    file.path.write_text("[" * 100_000)
    refused(file.json, "the file must be readable JSON, got brackets nested too deep")
    refused(file.yaml, "bytes must be at most 32,768, got 100,000")
    file.path.write_text("[" * 32_000)
    refused(file.yaml, "the file must be a readable YAML file, got brackets nested too deep")
    file.path.write_text('{"a": 1, "a": 2}')
    refused(file.json, "got 'a' twice in an object")
    file.path.write_bytes(b" " * (1 << 21))
    refused(file.json, "bytes must be at most 1,048,576, got 2,097,152")
    make_target(tmp_path)
    data = (tmp_path / "t.safetensors").read_bytes()
    tensors, header = safetensors.torch.load(data), json.loads(metadata_of(data)["target"])
    header["sizes"]["unigram"] = 10**12
    del header["sha256"]
    header["sha256"] = target_file._sha256(header, tensors)
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors", {"target": json.dumps(header)})
    refused(lambda: target_file.load(tmp_path / "t.safetensors"), r"sizes\[unigram\] must be an int of at least 1")
    for size in (2**40, 2**63, 0, len(data)):
        (tmp_path / "t.safetensors").write_bytes(size.to_bytes(8, "little") + data[8:])
        refused(lambda: target_file.load(tmp_path / "t.safetensors"), f"got a header of {size:,} bytes in a file of")


def test_a_configuration_gives_no_flags(tmp_path: Path) -> None:
    """Values are values, whatever they begin with, and their types are said by file and name."""
    file = tmp_path / "job.yaml"
    for text, said in {
        "text: [--model]": "text must hold numbers, and texts that do not begin with '-', got '--model'",
        "text: lambada\nmodel: smollm2\nmax_length: many": "max_length must be a whole number, got 'many'",
        "learning_rate: .nan\nmodel: a\ntext: lambada\nuse_cpu: true": "learning_rate must be",
        "max_length: true": "max_length must be a whole number, got 'True'",
        "max_length: 9.5": "max_length must be a whole number, got '9.5'",
        "a: &x [1]\nb: *x": "the file must be a readable YAML file, got an anchor, alias or tag",
        "max_length: 1\nmax_length: 2": "got a name twice in a mapping",
        "model: !!python/name:os.system ''": "got an anchor, alias or tag",
    }.items():
        file.write_text(text)
        refused(lambda: parse([str(file)]), said)
    file.write_text("model: --bf16\ntext: lambada\nuse_cpu: true")
    assert parse([str(file)])[0].model == "--bf16"


def test_terms_of_a_checkpoint_are_data(tmp_path: Path) -> None:
    """Nothing in them is run, and what is no state of the terms is refused."""

    def read() -> None:
        load_terms(str(tmp_path), {"term": Delayed(TokenL2(torch.ones(4) / 4))})

    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    good = Delayed(TokenL2(torch.ones(4) / 4)).state_dict()
    for state, said in (
        ({"term": Runs()}, r"the file must be readable by torch.load\(weights_only=True\)"),
        ([1], r"the file must be an object, got \[1\]"),
        ({"term": {**good, "steps": -1}}, "have steps, an int of at least 0"),
        ({"term": {**good, "duals": [1.0]}}, "be of the terms"),
        ({"term": {**good, "running": torch.ones(5)}}, "have running means in float64, or None, got torch.float32"),
        ({"term": {**good, "running": torch.ones(2, 2).double()}}, r"have running means \[1 \+ V \+ 2 \* 0\]"),
        ({"term": {**good, "running": torch.ones(9).double()}}, "be of a vocabulary of 4, got 8"),
    ):
        torch.save(state, tmp_path / TERMS_FILE)
        refused(read, said)
    assert not (tmp_path / "ran").exists()
    (tmp_path / TERMS_FILE).write_bytes(b"PK\3\4 and no more")
    refused(read, "the file must be readable by torch.load")
    torch.save({"term": {**good, "running": torch.ones(5).double()}}, tmp_path / TERMS_FILE)
    read()
