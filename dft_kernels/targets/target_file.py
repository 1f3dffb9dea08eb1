"""A Target on disk: one safetensors file with a JSON header, written at once, refused where it is not what was written.

The header's key `target` is {"format", "version", "about", "noise", "warnings", "sha256"}; sha256 is of the rest of it
and of every tensor's name, dtype, shape and bytes. A vector that is mostly zeros is kept as NAME.indices and
NAME.values, with NAME.size in `sizes`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..store.fingerprint import tokenizer_fingerprint
from .target import About, Target

FORMAT, VERSION = "dft_kernels target", 1
PRESETS = Path(__file__).parent / "presets"
_SUFFIX = ".safetensors"


def fail(path: Path, field: str, relation: str, got: object, remedy: str) -> NoReturn:
    """Raise what is wrong with a target's file, by file and field."""
    raise ValueError(f"target: {path}: {field} must {relation}, got {got}. {remedy}.")


def presets() -> list[str]:
    """Names of the targets that the package brings."""
    return sorted(path.stem for path in PRESETS.glob(f"*{_SUFFIX}"))


def save(target: Target, path: str | Path) -> Path:
    """Write the file, atomically, and give its path."""
    from safetensors.torch import save as serialized

    path = Path(path)
    tensors, sizes = _packed(target.tensors)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "about": dataclasses.asdict(target.about),
        "noise": dict(target.noise),
        "warnings": list(target.warnings),
        "sizes": sizes,
    }
    header["sha256"] = _sha256(header, tensors)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(serialized(tensors, {"target": json.dumps(header)}))
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        fail(path, "the file", "be writable", error, "Name another with --out")
    return path


def load(name: str | Path, tokenizer: Any = None) -> Target:
    """A target by file or by the name of a preset.

    tokenizer: of the model; a target of another one's tokens is refused. One without token statistics serves any.
    Raises ValueError, naming file and field, for what is missing, damaged, edited, or of another tokenizer.
    """
    path = PRESETS / f"{name}{_SUFFIX}" if str(name) in presets() else Path(name)
    header, tensors = _read(path)
    try:
        target = Target(
            About(**header["about"]),
            _unpacked(tensors, header["sizes"]),
            {str(key): float(value) for key, value in header["noise"].items()},
            tuple(header["warnings"]),
        )
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        fail(path, "the header", "be as `target build` writes it", repr(error), "Build it again")
    if tokenizer is not None and target.about.tokenizer_sha256 is not None:
        check_tokenizer(path, target, tokenizer)
    return target


def check_tokenizer(path: str | Path, target: Target, tokenizer: Any) -> None:
    """Refuse a target of another tokenizer's tokens."""
    found = tokenizer_fingerprint(tokenizer)
    if found != target.about.tokenizer_sha256:
        fail(
            Path(path),
            "tokenizer_sha256",
            f"be {found}, of the given tokenizer",
            f"{target.about.tokenizer_sha256}, of {target.about.tokenizer}",
            "Build it for this tokenizer: dft-kernels target build, or of presets dft-kernels target presets",
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import safetensors

    if not path.is_file():
        known = ", ".join(presets()) or "none"
        fail(path, "the file", f"be there, or be a preset ({known})", "none", "Check the name: dft-kernels target list")
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("target")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        header = json.loads(said) if said is not None else None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        fail(path, "the file", "be a whole safetensors file", error, "Restore it, or build it again")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = repr(header.get("format")) if isinstance(header, dict) else "no header of one"
        fail(path, "format", f"be {FORMAT!r}", got, "Name a file that `dft-kernels target build` made")
    if header.get("version") != VERSION:
        fail(path, "version", f"be {VERSION}", header.get("version"), "Read it with the dft_kernels that wrote it")
    claimed = header.pop("sha256", None)
    found = _sha256(header, tensors)
    if claimed != found:
        fail(
            path, "sha256", f"be {claimed}, as its header says", found, "It was changed: restore it, or build it again"
        )
    return header, tensors


def _sha256(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def _unpacked(tensors: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith((".indices", ".values"))}
    for name, size in sizes.items():
        values = tensors[f"{name}.values"]
        out[name] = values.new_zeros(size).index_put((tensors[f"{name}.indices"].long(),), values)
    return out
