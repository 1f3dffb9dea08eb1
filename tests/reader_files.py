"""Files of every kind that the package reads, how they may be changed, and their readers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from dft_kernels.benchmarks import tables
from dft_kernels.commands import train
from dft_kernels.commands.arguments import UsageError
from dft_kernels.materials.sources import ABOUT, read_about
from dft_kernels.models.correction import CORRECTION_FILE, add_correction, load_correction, save_correction
from dft_kernels.store.join import join
from dft_kernels.store.manifest import Contents, Share
from dft_kernels.store.reader import Store
from dft_kernels.store.writer import StoreWriter
from dft_kernels.targets import target_file
from dft_kernels.targets.target import About, Target

VALUES = [
    -1, 0, 1, 2**31, 2**53, 2**63, 10**30, -0.5, 0.5, 1e308, float("nan"), float("inf"), True, False, None, "", "a",
    "../x", "/etc/passwd", "a/b", "a\\b", "..", "nul", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], {"a": 1}, [1, "a"],
    "--output_dir", "2024-99-99", "1e3", "é",
]  # fmt: skip


# ---- mutations


def bytewise(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, the end cut off, a chunk twice, two chunks swapped, or random bytes in between."""
    out = bytearray(data)
    first, second = sorted(chance.randrange(len(out) + 1) for _ in range(2))
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.choice((1, 1, 3, 20))):
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del out[first:]
    elif kind == 2:
        out[second:second] = out[first:second]
    elif kind == 3:
        middle = (first + second) // 2
        out[first:second] = out[middle:second] + out[first:middle]
    else:
        out[first:first] = chance.randbytes(chance.choice((1, 4, 64)))
    return bytes(out)


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value, with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from spots(value[key])


def valuewise(value: Any, chance: random.Random) -> Any:
    """A JSON value with some value of it, or type of value, or name, changed."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2, 3))):
        found = list(spots(value))
        if not found:
            return value
        container, key = chance.choice(found)
        kind = chance.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[chance.choice([f"{key}x", key.upper(), "", "a", "\ud800"])] = container.pop(key)
        elif kind == 2:
            container[key] = json.loads(json.dumps(chance.choice(found)[0]))
        elif kind == 3:
            container[key] = str(container[key]) if chance.random() < 0.5 else [container[key]]
        else:
            container[key] = chance.choice(VALUES)
    return value


def within_json(data: bytes, chance: random.Random) -> bytes:
    return json.dumps(valuewise(json.loads(data), chance)).encode()


def within_tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header is changed, metadata that are JSON too, and says its new length."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    inside = header.get("__metadata__", {})
    if inside and chance.random() < 0.6:
        (name,) = inside
        said = valuewise(json.loads(inside[name]), chance)
        if name == "target" and isinstance(said, dict) and "sha256" in said and chance.random() < 0.8:
            del said["sha256"]  # made to fit what was changed, so that what is behind the checksum is reached
            tensors = safetensors.torch.load(data)
            said["sha256"] = target_file._sha256(said, tensors)
        inside[name] = json.dumps(said)
    else:
        header = valuewise(header, chance)
    text = json.dumps(header).encode()
    size = len(text) if chance.random() < 0.9 else chance.choice([0, 1, 2**40, 2**63, len(text) + 1])
    return size.to_bytes(8, "little") + text + data[end:]


def within_csv(data: bytes, chance: random.Random) -> bytes:
    lines = list(csv.reader(io.StringIO(data.decode(), newline="")))
    line = chance.choice(lines)
    kind = chance.randrange(3)
    if kind == 0:
        del line[chance.randrange(len(line))]
    elif kind == 1:
        line.insert(chance.randrange(len(line)), chance.choice(line))
    else:
        value = chance.choice(VALUES)
        line[chance.randrange(len(line))] = str(value).encode("utf-8", "replace").decode()
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue().encode()


def within_yaml(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        name = chance.choice(list(yaml.safe_load(data)))
        odd = [
            "&a [*a, *a]",
            "!!python/object:os.system x",
            "!!int x",
            "2024-99-99",
            "0x_",
            "!!bool x",
            "[" * 9999,
            "<<",
        ]
        return data + f"\n{name}: {chance.choice(odd)}\n".encode()
    return yaml.safe_dump(valuewise(yaml.safe_load(data), chance), allow_unicode=chance.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


# ---- readers: a folder of files that are right, which of them to change and how, and what reading gives


@dataclass
class Reader:
    """files: name -> its structured mutation. read: of the folder, after comparing what it gave with the files."""

    make: Callable[[Path], None]
    files: dict[str, Callable[[bytes, random.Random], bytes]]
    read: Callable[[Path], None]


V, H, K = 20, 4, 3


def make_store(kind: str, share: Share | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        width = H if kind == "hidden" else K
        contents = Contents(kind, V, width, "teacher", "0" * 64, "1" * 64)
        head = (torch.randn(V, H, generator=generator), torch.zeros(V)) if kind == "hidden" else None
        with StoreWriter(folder, contents, head, share) as writer:
            for lengths in ((3, 2), (4,)):
                tokens = [torch.randint(0, V, (length,), generator=generator) for length in lengths]
                rows: dict[str, list[torch.Tensor]] = {name: [] for name in contents.names}
                for length in lengths:
                    if kind == "hidden":
                        rows["hidden"].append(torch.randn(length, H, generator=generator))
                        continue
                    log_p = torch.randn(length, V, generator=generator).log_softmax(-1)
                    top = log_p.topk(K)
                    rows["indices"].append(top.indices)
                    rows["log_probs"].append(top.values)
                    rows["tail"].append(log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1))
                writer.append(tokens, **rows)

    return make


def read_store(folder: Path) -> None:
    store = Store(folder)
    said = json.loads((folder / "manifest.json").read_bytes())
    assert all(getattr(store.contents, one.name) == said.get(one.name, one.default) for one in fields(Contents))
    tokens = []
    for part in said["shards"]:
        data = (folder / part["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == part["sha256"]
        tokens += safetensors.torch.load(data)["tokens"].tolist()
    batch = store.batch(range(len(store))) if len(store) else {}
    read = [int(one) for number in range(len(store)) for one in store[number]["input_ids"]]
    assert read == tokens
    if batch:
        store.teacher(batch)
    store.check_values()


FIRST = Share(0, 2, first=0, sequences=3, file=0, whole=6, shard_rows=4, sha256="3" * 64)


def make_shards(folder: Path) -> None:
    make_store("hidden", FIRST)(folder)
    make_store("hidden", replace(FIRST, index=1, first=3, file=2))(folder / "second")


def join_shards(folder: Path) -> None:
    """The join of the folder's shard and the second has the files of both; where it is refused there is none."""
    out, folders = folder / "joined", [folder, folder / "second"]
    try:
        joined = join(out, folders)
    except ValueError:
        assert not (out / "manifest.json").exists()
        shutil.rmtree(out, ignore_errors=True)
        raise
    try:
        assert len(joined) == 6
        said = [json.loads((one / "manifest.json").read_bytes())["shards"] for one in folders]
        assert [vars(part) for part in joined.parts] == said[0] + said[1]
        read_store(out)
    finally:
        shutil.rmtree(out)


def make_target(folder: Path) -> None:
    unigram = torch.zeros(300)
    unigram[:6] = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.1, 0.1])
    tensors = {
        "unigram": unigram,
        "sentence_words": torch.tensor([0.0, 0.25, 0.75]),
        "ngram_contexts": torch.tensor([[-1, 2], [3, 4]], dtype=torch.int32),
        "ngram_starts": torch.tensor([0, 1, 3], dtype=torch.int32),
        "ngram_completions": torch.tensor([5, 1, 2], dtype=torch.int32),
        "ngram_probability": torch.tensor([0.5, 0.25, 0.125]),
        "ngram_context_probability": torch.tensor([0.5, 0.25]),
    }
    about = About("made", "a test", "none", 1, 200, 40, 4, 50, "tiny", "2" * 64, "0.1.0")
    target_file.save(Target(about, tensors, {"unigram, L2": 0.1}, ("unigram: small",)), folder / "t.safetensors")


def read_target(folder: Path) -> None:
    found = target_file.load(folder / "t.safetensors")
    data = (folder / "t.safetensors").read_bytes()
    (said,) = (value for name, value in metadata_of(data).items() if name == "target")
    header = json.loads(said)
    assert vars(found.about) == header["about"]
    assert dict(found.noise) == header["noise"]
    tensors = safetensors.torch.load(data)
    for name in found:
        if name in tensors:
            assert torch.equal(found[name], tensors[name])
        else:
            assert len(found[name]) == header["sizes"][name]
            assert torch.equal(found[name][tensors[f"{name}.indices"].long()], tensors[f"{name}.values"])


def metadata_of(data: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return found


class Tiny(torch.nn.Module):
    """As much of a causal LM as a correction needs."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(H, V, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head


def make_correction(folder: Path) -> None:
    model = Tiny()
    add_correction(model, 2, True)
    save_correction(model, folder / CORRECTION_FILE)


def read_correction(folder: Path) -> None:
    model = Tiny()
    before = list(model.state_dict())
    try:
        found = load_correction(model, folder / CORRECTION_FILE)
    except ValueError:
        assert list(model.state_dict()) == before
        assert model.lm_head.weight.requires_grad
        raise
    tensors = safetensors.torch.load((folder / CORRECTION_FILE).read_bytes())
    assert tensors.keys() == found.state_dict().keys()
    assert all(torch.equal(value, tensors[name]) for name, value in found.state_dict().items())


def make_csv(folder: Path) -> None:
    plain = ("2026-01-01", "abc", 'a "machine", 2 threads', "3.11", "2.13", "cpu", 8, 4, 20)
    rows = [
        tables.Row(*plain, "float32", loss, "both", "eager", "torch 2.13", status, reason, 3, 1.5, 1.0, 2.0)
        for loss, status, reason in (("forward_kl", "ok", ""), ("cross_entropy", "failed", "no\nreason"))
    ]
    tables.write(folder / "bench.csv", rows)


def read_csv(folder: Path) -> None:
    found = tables.read(folder / "bench.csv")
    lines = list(csv.reader(io.StringIO((folder / "bench.csv").read_bytes().decode(), newline="")))
    assert len(found) == len(lines) - 1
    for row, line in zip(found, lines[1:], strict=True):
        for (name, value), text in zip(vars(row).items(), line, strict=True):
            assert value == (float(text or "nan") if isinstance(value, (int, float)) else text) or not text, name
    assert len(tables.render(found)) == len(tables.by_case(found))


def make_yaml(folder: Path) -> None:
    (folder / "job.yaml").write_text(
        "model: smollm2\ntext: [lambada, lambada]\nmax_length: 99\nlearning_rate: 1e-4\nteacher: null\ntemperature: 2\n"
        "use_cpu: true\nheld_out: 4\ndivergence: reverse_kl\n"
    )


def parse(arguments: list[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Job and DFTConfig of a command line, and what its file says; errors as the command prints them."""
    parser = train.parser()
    try:
        found = parser.parse_args(arguments)
    except UsageError as error:
        raise ValueError(f"train: {str(error).removeprefix('train: ')}") from error
    return found.job, found.training, parser.given


def read_yaml(folder: Path) -> None:
    job, options, given = parse([str(folder / "job.yaml")])
    said = yaml.safe_load((folder / "job.yaml").read_bytes())
    assert given == said
    for name, value in vars(job).items():
        if said.get(name) is not None:
            read, held = (one if isinstance(one, list) else [one] for one in (value, said[name]))
            assert [str(one) for one in read] == [str(one) for one in held], name
    if said.get("learning_rate") is not None:
        assert options.learning_rate == float(said["learning_rate"])


def make_about(folder: Path) -> None:
    (folder / ABOUT).write_text(json.dumps({"base": "smollm2", "held_out": {"kl": 1.0}, "job": {"max_length": 9}}))


def read_job(folder: Path) -> None:
    base, job = read_about("sample", folder)
    said = json.loads((folder / ABOUT).read_bytes())
    assert (base, job) == (said["base"], said["job"]) or job != job


READERS = {
    "hidden store": Reader(
        make_store("hidden"),
        {"manifest.json": within_json, "head.safetensors": within_tensors, "shard-00001.safetensors": within_tensors},
        read_store,
    ),
    "topk store": Reader(
        make_store("topk"), {"manifest.json": within_json, "shard-00000.safetensors": within_tensors}, read_store
    ),
    "store of shards": Reader(
        make_shards, {"manifest.json": within_json, "shard-00001.safetensors": within_tensors}, join_shards
    ),
    "target": Reader(make_target, {"t.safetensors": within_tensors}, read_target),
    "correction": Reader(make_correction, {CORRECTION_FILE: within_tensors}, read_correction),
    "csv": Reader(make_csv, {"bench.csv": within_csv}, read_csv),
    "yaml": Reader(make_yaml, {"job.yaml": within_yaml}, read_yaml),
    "about": Reader(make_about, {ABOUT: within_json}, read_job),
}
