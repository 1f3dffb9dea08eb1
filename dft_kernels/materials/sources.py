"""What the commands' `--model` and `--text` name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..models.correction import CORRECTION_FILE, load_correction
from ..targets.corpus import passages
from .models import lambada, read_texts, reading, smollm2, smollm2_folder

ABOUT = "dft_kernels.json"  # beside the result: what it was made of
SMOLLM2, LAMBADA = "smollm2", "lambada"  # names of what pip brings
MODEL_HELP = "a folder or name for transformers, or smollm2, which pip brings"
TEXT_HELP = "UTF-8 files; lambada, which pip brings; or hf:NAME[:SPLIT[:COLUMN]], a dataset"


@contextmanager
def _loading(name: str, argument: str) -> Iterator[None]:
    """Errors of transformers about what an argument names, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"materials: {argument} must be a folder or name that transformers loads, or {SMOLLM2}, got {name!r}: "
            f"{why}. Check the folder, or that its hub is reachable."
        ) from error


def check_model(name: str, argument: str = "model") -> None:
    """ValueError for what `model_of` cannot load, from its configuration alone: before anything large is read."""
    import transformers

    if name != SMOLLM2:
        with _loading(name, argument):
            transformers.AutoConfig.from_pretrained(name)


def model_of(name: str, cache: Path, dtype: Any = "auto", argument: str = "model") -> tuple[Any, Any]:
    """A causal LM and its tokenizer: smollm2, which pip brings, or a folder or name for transformers.

    dtype: "auto": as stored. argument: what gave the name, for errors."""
    if name == SMOLLM2:
        model, tokenizer = smollm2(cache)
        return (model if dtype == "auto" else model.to(dtype)), tokenizer
    import transformers

    with _loading(name, argument):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer


class Trained(NamedTuple):
    """What a name stands for: a whole model, or an adapter (a folder's file) of the model `base`. base: what a whole
    model was trained from, None where that is not known."""

    name: str
    base: str | None
    adapter: str | None

    def load(self, cache: Path) -> tuple[Any, Any]:
        """The model, adapted, and its tokenizer."""
        if self.adapter is None:
            return model_of(self.name, cache)
        model, tokenizer = model_of(str(self.base), cache, argument="base")
        if self.adapter == CORRECTION_FILE:
            load_correction(model, Path(self.name) / CORRECTION_FILE)
        else:
            import peft

            model = peft.PeftModel.from_pretrained(model, self.name)
        return model, tokenizer


def trained_model(name: str, base: str | None) -> Trained:
    """A model by name, or what `dft-kernels train` has saved; base: instead of what that was trained from. ValueError,
    from configurations alone, for what cannot be loaded."""
    folder, argument = Path(name), "base"
    if base is None and (folder / ABOUT).exists():
        base = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["base"]
        argument = "model"  # which names it
    adapter = next((f for f in (CORRECTION_FILE, "adapter_config.json") if (folder / f).exists()), None)
    if adapter is None:
        check_model(name)
    elif base is None:
        raise ValueError(f"materials: base must name the model of {folder / adapter}, got none. Name it.")
    if base is not None:
        check_model(base, argument)
    return Trained(name, base, adapter)


def tokenizer_of(name: str, cache: Path) -> Any:
    """A tokenizer: smollm2's, which pip brings, or a folder or name for transformers."""
    import transformers

    if name == SMOLLM2:
        return transformers.AutoTokenizer.from_pretrained(smollm2_folder(cache))
    with _loading(name, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(name)


def _listed(name: str, cache: Path) -> Iterable[str] | None:
    """The texts of a source that is no file, None for a file."""
    if name == LAMBADA:
        return lambada(cache)
    return _dataset(*name.split(":")[1:]) if name.startswith("hf:") else None


def check_text(name: str) -> None:
    """ValueError for a source of text that cannot be read, from its beginning alone."""
    path = Path(name)
    pipe = path.exists() and not path.is_file() and not path.is_dir()  # can be read only once
    if name != LAMBADA and not name.startswith("hf:") and not pipe:
        with reading(name) as text:
            text.read(1 << 16)


def passages_of(names: list[str], cache: Path, argument: str = "text") -> Iterator[str]:
    """The texts that `--text` names, in passages, read as they are asked for."""
    for name in names:
        listed = _listed(name, cache)
        if listed is None:
            with reading(name, argument) as lines:
                yield from passages(lines)
        else:
            for text in listed:
                yield from passages(text.splitlines(True))


def texts_of(names: list[str], cache: Path) -> list[str]:
    """The texts that `--text` names, in order."""
    texts: list[str] = []
    for name in names:
        listed = _listed(name, cache)
        texts += read_texts([name]) if listed is None else listed
    return texts


def _dataset(name: str = "", split: str = "train", column: str = "text", *more: str) -> Iterable[str]:
    if not name or more:
        raise ValueError(f"materials: text must be hf:NAME[:SPLIT[:COLUMN]], got hf:{name}. Name a dataset.")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"materials: text: hf:{name} needs datasets, got none. pip install datasets.") from error
    try:
        found = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"materials: text: hf:{name} must be a dataset that has a split {split!r}, got: {error}. Check the name, "
            "or that its hub is reachable."
        ) from error
    if column not in found.column_names:
        got = found.column_names
        raise ValueError(f"materials: text: hf:{name} must have a column {column!r}, got {got}. Name it.")
    return found[column]
