"""What a training job is: typed, checked before anything is loaded, and as a YAML file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..materials.models import cache_folder
from ..materials.sources import MODEL_HELP, TEXT_HELP
from .target_terms import TERMS, read_terms


@dataclass
class Job:
    """What is trained on what; the rest is `DFTConfig`'s."""

    model: str | None = field(default=None, metadata={"help": f"what is trained: {MODEL_HELP}"})
    text: list[str] | None = field(default=None, metadata={"help": f"{TEXT_HELP}; not with a store, which has its own"})
    teacher: str | None = field(
        default=None,
        metadata={"help": "a store of dft-kernels capture, or a model as above; none: cross-entropy alone"},
    )
    principles: str | None = field(
        default=None,
        metadata={"help": "a UTF-8 file that a running teacher reads before every text, and not the model"},
    )
    target: str | None = field(
        default=None, metadata={"help": "statistics of human writing: a file of dft-kernels target build, or a preset"}
    )
    terms: list[str] | None = field(
        default=None,
        metadata={
            "help": f"NAME=WEIGHT of the target's: {', '.join(TERMS)}; NAME=0.5x: the weight at which it pulls half as "
            "hard as cross-entropy holds, measured; NAME=floor: at most what human text of the same size is off by, by "
            "a dual weight"
        },
    )
    rollout_terms: list[str] | None = field(
        default=None,
        metadata={"help": "the same of text that the model writes; reference_kl=WEIGHT keeps it near where it started"},
    )
    length: int = field(default=512, metadata={"help": "tokens a sequence at most; longer texts are cut"})
    held_out: int = field(default=16, metadata={"help": "sequences that are measured before and after, not trained on"})
    lora_rank: int = field(default=0, metadata={"help": "train LoRA of this rank on all linear layers, by PEFT"})
    correction_rank: int = field(default=0, metadata={"help": "train a CorrectionHead of this rank, and nothing else"})
    dtype: str = field(default="float32", metadata={"help": "of the model's weights; --bf16 multiplies in bf16"})
    cache: str = field(default=str(cache_folder()), metadata={"help": "where models and texts of pip are kept"})

    def __post_init__(self) -> None:
        _need(self.model is not None, "model", "be given", None, "Name a folder, or smollm2")
        for name, least in (("length", 2), ("held_out", 0), ("lora_rank", 0), ("correction_rank", 0)):
            _need(getattr(self, name) >= least, name, f"be at least {least}", getattr(self, name), "Raise it")
        one = not (self.lora_rank and self.correction_rank)
        _need(one, "correction_rank", "be 0 with lora_rank", self.correction_rank, "Give one of the two")
        dtypes = ("float32", "bfloat16", "float16")
        _need(self.dtype in dtypes, "dtype", f"be one of {', '.join(dtypes)}", self.dtype, "Pick one of these")
        stored = self.stored
        _need(bool(self.text) != stored, "text", "be given, but not with a store", self.text, "Name texts, or a store")
        prompted = self.principles is None or (self.teacher is not None and not stored)
        _need(prompted, "principles", "come with a teacher that is run", self.teacher, "Name a model as the teacher")

        for name, own_text in (("terms", False), ("rollout_terms", True)):
            try:
                read_terms(getattr(self, name) or (), own_text)
            except ValueError as error:
                raise ValueError(f"train: {name}: {str(error).removeprefix('terms: ')}") from error
        named = self.terms or self.rollout_terms
        both = (self.target is None) == (named is None)
        relation = "be given together with terms or rollout_terms"
        _need(both, "target", relation, named or self.target, "Name both, or none")

    @property
    def stored(self) -> bool:
        """Whether the teacher is a store."""
        from ..store.manifest import MANIFEST

        return self.teacher is not None and (Path(self.teacher) / MANIFEST).exists()


def read(file: Path, known: Collection[str]) -> dict[str, Any]:
    """A YAML file of names and values; ValueError, naming the file, where it is none, and the key that is not known."""
    import yaml

    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"train: {file} must be a readable YAML file, got: {error}. See dft-kernels train --help."
        ) from error
    _need(isinstance(given, dict), str(file), "hold names and values", type(given).__name__, "Write NAME: VALUE lines")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
            relation = f"be a key of {file} that there is"
            _need(False, str(name), relation, "none of that name", f"Did you mean {near}?")
    return dict(given)


def as_flags(given: dict[str, Any]) -> list[str]:
    """A file's values as flags, so that both are read by the same types."""
    out = []
    for name, value in given.items():
        if isinstance(value, list):
            out += [f"--{name}", *map(str, value)]
        elif value is not None:
            out.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return out


def _need(holds: bool, name: str, relation: str, got: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"train: {name} must {relation}, got {got}. {remedy}{'' if remedy.endswith('?') else '.'}")
