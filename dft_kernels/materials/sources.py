"""What the commands' `--model` and `--text` name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..files import Source
from ..models.correction import CORRECTION_FILE, load_correction
from ..targets.corpus import passages
from . import records
from .models import coqa, lambada, read_texts, reading, smollm2, smollm2_folder

ABOUT = "dft_kernels.json"  # beside the result: what it was made of
_TABLES = (".json", ".csv", ".tsv", ".arrow")  # which would be learned as they are spelled
SMOLLM2, LAMBADA, COQA = "smollm2", "lambada", "coqa"  # names of what pip brings
MODEL_HELP = "a folder or name for transformers, or smollm2, which pip brings"
TEXT_HELP = (
    "UTF-8 files; .jsonl and .parquet files, folders of datasets.save_to_disk, or hf:NAME[:SPLIT[:COLUMN]], whose "
    "records have text, prompt and completion, or messages; or what pip brings: lambada (novels), coqa (conversations)"
)


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


def _meant(name: str, known: str, argument: str) -> None:
    """ValueError for a misspelt name of what pip brings."""
    if not Path(name).exists() and difflib.get_close_matches(name.lower(), [known], 1, 0.75):
        raise ValueError(f"materials: {argument} must be a name that there is, got {name!r}. Did you mean {known}?")


def check_model(name: str, argument: str = "model") -> None:
    """ValueError for what `model_of` cannot load, from its configuration alone: before anything large is read, and
    before a hub is asked for what can only be a folder."""
    import transformers

    if name != SMOLLM2:
        _meant(name, SMOLLM2, argument)
        local = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
        folder = Path(name)
        if (folder.is_dir() and not (folder / "config.json").exists()) or (local and not folder.exists()):
            got = f"{name!r}, {'without one' if folder.is_dir() else 'which is not there'}"
            remedy = "Name what save_pretrained has written"
            raise ValueError(f"materials: {argument} must be a folder with config.json, got {got}. {remedy}.")
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


def read_about(function: str, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The base model and the configuration of a folder of results; None and {} where ABOUT is not there."""
    file = Source(function, folder / ABOUT, "Restore it, or train into another folder")
    if not os.path.exists(file.path):
        return None, {}
    whole = file.json()
    return file.typed("base", whole.get("base"), str), file.typed("job", whole.get("job"), dict)


class Trained(NamedTuple):
    """What a name stands for: a whole model, or an adapter (a folder's file) of the model `base`. base: what a whole
    model was trained from, None where that is not known."""

    name: str
    base: str | None
    adapter: str | None

    @property
    def whole(self) -> str:
        """The name of the whole model that is loaded."""
        return self.name if self.adapter is None else str(self.base)

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
    if base is None:
        base, _ = read_about("materials", folder)
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

    folder = smollm2_folder(cache) if name == SMOLLM2 else name
    with _loading(name, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(folder)


def config_of(name: str, cache: Path) -> Any:
    """The configuration of a model that `check_model` has found."""
    import transformers

    return transformers.AutoConfig.from_pretrained(smollm2_folder(cache) if name == SMOLLM2 else name)


def _listed(name: str, cache: Path, only: str | None, faults: records.Faults | None) -> Iterable[str] | None:
    """The texts of a source that is no file of one text, None for that. only: as of `Document.texts`."""
    if name == LAMBADA:
        return lambada(cache)
    documents = _records(name, cache, faults or records.Faults())
    return None if documents is None else (text for document in documents for text in document.texts(only))


def _records(name: str, cache: Path, faults: records.Faults) -> Iterator[records.Document] | None:
    """The records of a source, None where it has texts."""
    if name == COQA:
        return _conversations(cache)
    return records.documents([name], faults) if records.structured(name) else None


def _conversations(cache: Path) -> Iterator[records.Document]:
    """CoQA's: the story stands before the first question."""
    for number, (story, turns) in enumerate(coqa(cache), 1):
        messages = []
        for at, (question, answer) in enumerate(turns):
            asked = question if at else f"{story}\n\n{question}"
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        yield records.Document(f"{COQA}, dialogue {number}", messages)


def check_text(name: str) -> None:
    """ValueError for a source of text that cannot be read, from its beginning alone."""
    pipe = Path(name).is_fifo()  # can be read only once
    if name in (LAMBADA, COQA) or pipe:
        return
    for known in (LAMBADA, COQA):
        _meant(name, known, "text")
    if records.structured(name):
        records.check(name)
        return
    if Path(name).suffix.lower() in _TABLES:
        raise ValueError(
            f"materials: text must be text or records, got {name}. Write its rows into .jsonl or .parquet."
        )
    with reading(name) as text:
        text.read(1 << 16)


def passages_of(
    names: list[str],
    cache: Path,
    argument: str = "text",
    only: str | None = None,
    faults: records.Faults | None = None,
) -> Iterator[str]:
    """The texts that `--text` names, in passages, read as they are asked for. only: as of `Document.texts`. faults: of
    records; None: the first is raised."""
    for name in names:
        listed = _listed(name, cache, only, faults)
        if listed is None:
            with reading(name, argument) as lines:
                yield from passages(lines)
        else:
            for text in listed:
                yield from passages(text.splitlines(True))


def texts_of(
    names: list[str],
    cache: Path,
    only: str | None = None,
    faults: records.Faults | None = None,
    argument: str = "text",
) -> list[str]:
    """The texts that `--text` names, in order. only, faults: as of `passages_of`; argument: what named them, for
    errors."""
    texts: list[str] = []
    for name in names:
        listed = _listed(name, cache, only, faults)
        texts += read_texts([name], argument) if listed is None else listed
    return texts


def documents_of(names: list[str], cache: Path, faults: records.Faults) -> Iterator[records.Document]:
    """What `--text` names, as documents: records, and each text as one."""
    for name in names:
        found = _records(name, cache, faults)
        if found is not None:
            yield from found
        else:
            for number, text in enumerate(texts_of([name], cache), 1):
                yield records.Document(f"{name}, text {number}", text)
