"""What the commands' `--model` and `--text` name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import Source, regular
from ..models.correction import CORRECTION_FILE, load_correction
from ..targets.corpus import passages
from .models import lambada, read_texts, smollm2, smollm2_folder

ABOUT = "dft_kernels.json"  # beside the result: what it was made of
MODEL_HELP = "a folder or name for transformers, or smollm2, which pip brings"
TEXT_HELP = "UTF-8 files; lambada, which pip brings; or hf:NAME[:SPLIT[:COLUMN]], a dataset"


def model_of(name: str, cache: Path, dtype: Any = "auto", flag: str = "--model") -> tuple[Any, Any]:
    """A model and its tokenizer, by folder, transformers' name, or as a material of pip's. dtype: "auto": as stored."""
    if name == "smollm2":
        model, tokenizer = smollm2(cache)
        return (model if dtype == "auto" else model.to(dtype)), tokenizer
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag} must be a folder or name that transformers loads, or smollm2, got {name!r}: "
            f"{str(error).splitlines()[0]}. Check the folder, or that its hub is reachable."
        ) from error


def read_about(function: str, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The base model and the configuration of a folder of results; None and {} where ABOUT is not there."""
    file = Source(function, folder / ABOUT, "Restore it, or train into another folder")
    if not os.path.exists(file.path):
        return None, {}
    whole = file.json()
    return file.typed("base", whole.get("base"), str), file.typed("job", whole.get("job"), dict)


def trained_model_of(name: str, base: str | None, cache: Path) -> tuple[Any, Any, str | None]:
    """A trained model, its tokenizer, and what it was trained from."""
    folder = Path(name)
    if base is None:
        base, _ = read_about("sample", folder)
    adapted = next((f for f in (CORRECTION_FILE, "adapter_config.json") if (folder / f).exists()), None)
    if adapted is None:
        return *model_of(name, cache), base
    if base is None:
        raise ValueError(f"sample: --base must name the model of {folder / adapted}, got none. Name it.")
    model, tokenizer = model_of(base, cache)
    if adapted == CORRECTION_FILE:
        load_correction(model, folder / CORRECTION_FILE)
    else:
        import peft

        model = peft.PeftModel.from_pretrained(model, name)
    return model, tokenizer, base


def tokenizer_of(name: str, cache: Path) -> Any:
    """A tokenizer, by folder, transformers' name, or as a material of pip's."""
    import transformers

    if name == "smollm2":
        return transformers.AutoTokenizer.from_pretrained(smollm2_folder(cache))
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer must be a folder or name that transformers loads, or smollm2, got {name!r}: "
            f"{str(error).splitlines()[0]}. Check the folder, or that its hub is reachable."
        ) from error


def passages_of(names: list[str], cache: Path) -> Iterator[str]:
    """The texts that `--text` names, in passages, read as they are asked for."""
    for name in names:
        if name == "lambada" or name.startswith("hf:"):
            for text in lambada(cache) if name == "lambada" else _dataset(*name.split(":")[1:]):
                yield from passages(text.splitlines(True))
        else:
            try:
                regular(Path(name))
                with Path(name).open(encoding="utf-8") as lines:
                    yield from passages(lines)
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--text must name readable UTF-8 files, got {name}: {error}.") from error


def texts_of(names: list[str], cache: Path) -> list[str]:
    """The texts that `--text` names, in order."""
    texts: list[str] = []
    for name in names:
        if name == "lambada":
            texts += lambada(cache)
        elif name.startswith("hf:"):
            texts += list(_dataset(*name.split(":")[1:]))
        else:
            texts += read_texts([Path(name)])
    return texts


def _dataset(name: str, split: str = "train", column: str = "text") -> Iterable[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--text hf:{name} needs datasets, got none. pip install datasets.") from error
    found = datasets.load_dataset(name, split=split)
    if column not in found.column_names:
        raise ValueError(f"--text hf:{name} must have a column {column!r}, got {found.column_names}. Name it.")
    return found[column]
