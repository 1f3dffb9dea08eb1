"""A Target on disk: one safetensors file with a JSON header, written atomically and verified by a checksum.

The header's key `target` is {"format", "version", "about", "noise", "warnings", "sizes", "sha256"}; sha256 covers the
rest of the header and every tensor's name, dtype, shape and bytes. A vector that is mostly zeros is stored sparsely,
as NAME.indices and NAME.values, with its length in `sizes`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import Source, shown
from ..store.fingerprint import tokenizer_fingerprint
from .target import STATISTICS, About, Target

FORMAT, VERSION = "dft_kernels target", 1
PRESETS = Path(__file__).parent / "presets"
_SUFFIX = ".safetensors"
_LONGEST = 1 << 22  # entries of a vector kept by its nonzero ones: a vocabulary, many times over


def presets() -> list[str]:
    """Names of the targets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob(f"*{_SUFFIX}"))


def save(target: Target, path: str | Path) -> Path:
    """Write the file atomically and return its path."""
    from safetensors.torch import save as serialized

    path = Path(path)
    header, tensors = _whole(target)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(serialized(tensors, {"target": json.dumps(header)}))
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        _source(path).fail("the file", "be writable", str(error), "Name another with --out")
    return path


def fingerprint(target: Target) -> str:
    """sha256 of all that a target is, as its file's header has it: the same wherever the file lies."""
    return str(_whole(target)[0]["sha256"])


def load(name: str | Path, tokenizer: Any = None) -> Target:
    """Load a target from a file, or a preset by name.

    tokenizer: the model's; ValueError for a target whose token statistics are of another tokenizer.
    Raises ValueError, by file and field, for a file that is missing, damaged, edited, or of another tokenizer.
    """
    path = PRESETS / f"{name}{_SUFFIX}" if str(name) in presets() else Path(name)
    file = _source(path)
    header, tensors = _read(file)
    about = file.record(About, header.get("about"), "about")
    noise = file.typed("noise", header.get("noise"), dict)
    warnings = file.typed("warnings", header.get("warnings"), list)
    sizes = file.typed("sizes", header.get("sizes"), dict)
    noise = {
        key: float(file.typed(f"noise[{shown(key)}]", value, float, (0, math.inf))) for key, value in noise.items()
    }
    said = tuple(file.typed(f"warnings[{number}]", text, str) for number, text in enumerate(warnings))
    dense = _unpacked(file, tensors, sizes)
    try:
        target = Target(about, dense, noise, said)
    except ValueError as error:
        file.fail("the tensors", "be what a corpus has", str(error))
    if tokenizer is not None and target.about.tokenizer_sha256 is not None:
        check_tokenizer(path, target, tokenizer)
    return target


def check_tokenizer(path: str | Path, target: Target, tokenizer: Any) -> None:
    """Raise ValueError for a target of another tokenizer."""
    found = tokenizer_fingerprint(tokenizer)
    if found != target.about.tokenizer_sha256:
        _source(Path(path)).fail(
            "tokenizer_sha256",
            f"be {found}, of the given tokenizer",
            f"{target.about.tokenizer_sha256}, of {target.about.tokenizer}",
            "Build it for this tokenizer: dft-kernels target build, or of presets dft-kernels target presets",
        )


def _source(path: Path) -> Source:
    return Source("target", path, "Restore it, or build it again")


def _read(file: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not os.path.exists(file.path):
        known = ", ".join(presets()) or "none"
        file.fail("the file", f"be there, or be a preset ({known})", "none", "Check the name: dft-kernels target list")
    with file.tensors() as opened:
        said = (opened.metadata() or {}).get("target")
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
    header = {} if said is None else file.parsed("target", said)
    if header.get("format") != FORMAT:
        got = shown(header["format"]) if "format" in header else "no header of one"
        file.fail("format", f"be {FORMAT!r}", got, "Name a file that `dft-kernels target build` made")
    if file.typed("version", header.get("version"), int) != VERSION:
        file.fail("version", f"be {VERSION}", header["version"], "Read it with the dft_kernels that wrote it")
    claimed = file.typed("sha256", header.pop("sha256", None), str)
    found = _sha256(header, tensors)
    if claimed != found:
        remedy = "It was changed: restore it, or build it again"
        file.fail("sha256", f"be {claimed}, as its header says", found, remedy)
    return header, tensors


def _sha256(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of it holds: header and tensors."""
    tensors, sizes = _packed(target.tensors)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "about": dataclasses.asdict(target.about),
        "noise": dict(target.noise),
        "warnings": list(target.warnings),
        "sizes": sizes,
    }
    return {**header, "sha256": _sha256(header, tensors)}, tensors


def _packed(tensors: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    out: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        indices = tensor.nonzero().squeeze(1) if tensor.ndim == 1 else None
        if indices is not None and len(tensor) >= 256 and 2 * len(indices) < len(tensor):
            out[f"{name}.indices"], out[f"{name}.values"] = indices.int(), tensor[indices].contiguous()
            sizes[name] = len(tensor)
        else:
            out[name] = tensor.contiguous()
    return out, sizes


def _unpacked(file: Source, tensors: dict[str, Tensor], sizes: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors dense. A size is untrusted: it is checked before a vector of that size is allocated."""
    packed = {f"{name}.{part}" for name in sizes for part in ("indices", "values")}
    out = {name: tensor for name, tensor in tensors.items() if name not in packed}
    for name, said in sizes.items():
        if name not in STATISTICS:
            file.fail(f"sizes[{shown(name)}]", f"be of one of {', '.join(STATISTICS)}", "another name")
        size = file.typed(f"sizes[{name}]", said, int, (1, _LONGEST))
        indices, values = (tensors.get(f"{name}.{part}") for part in ("indices", "values"))
        if indices is None or values is None or values.ndim != 1 or indices.shape != values.shape:
            got = "none" if indices is None or values is None else f"{list(indices.shape)} and {list(values.shape)}"
            file.fail(f"{name}.indices", f"be there, as many as {name}.values, in one dimension", got)
        at = indices.long() if indices.dtype == torch.int32 else indices.new_full((1,), -1).long()
        if bool((at.diff() < 1).any()) or bool(((at < 0) | (at >= size)).any()):
            file.fail(f"{name}.indices", f"be int32, rising, in 0..{size - 1}", shown(indices[:4].tolist()))
        out[name] = values.new_zeros(size).index_put((at,), values)
    return out
