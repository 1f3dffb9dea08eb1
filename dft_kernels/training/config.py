"""What a training job is: typed, checked before anything is loaded, and as a YAML file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import Source, shown
from ..materials.models import cache_folder
from ..materials.sources import MODEL_HELP, TEXT_HELP
from ..teachers.served_client import checked_url
from .serving import naming
from .target_terms import TERMS, read_terms


@dataclass
class Job:
    """What is trained on what; the rest is `DFTConfig`'s."""

    model: str | None = field(default=None, metadata={"help": f"what is trained: {MODEL_HELP}"})
    text: list[str] | None = field(default=None, metadata={"help": f"{TEXT_HELP}; not with a store, which has its own"})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "a store of dft-kernels capture, a model as above, or http(s)://HOST[:PORT] of a server of one; "
            "none: cross-entropy alone"
        },
    )
    served_model: str | None = field(
        default=None, metadata={"help": "which of a server's models is the teacher, if it has several"}
    )
    served_k: int = field(default=64, metadata={"help": "tokens a row of a served teacher"})
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
        metadata={
            "help": "the same of text that the model writes; reference_kl=WEIGHT keeps it near where it started, "
            "text_mmd=WEIGHT draws whole texts, by their embeddings, to what people wrote in their place"
        },
    )
    max_length: int = field(
        default=512, metadata={"help": "tokens a sequence at most; longer ones are cut", "aliases": ["--length"]}
    )
    assistant_only: bool = field(
        default=False, metadata={"help": "of conversations, the assistant's tokens alone count"}
    )
    completion_only: bool = field(
        default=False, metadata={"help": "of prompts and completions, the latter alone count"}
    )
    packing: bool = field(
        default=False, metadata={"help": "several sequences a row of `max_length` tokens; attention does not cross"}
    )
    limit: int | None = field(default=None, metadata={"help": "documents, the first ones, if not all"})
    skip_bad: bool = field(default=False, metadata={"help": "leave out records that cannot be read, and count them"})
    held_out: int = field(default=16, metadata={"help": "sequences that are measured before and after, not trained on"})
    lora_rank: int = field(default=0, metadata={"help": "train LoRA of this rank on all linear layers, by PEFT"})
    correction_rank: int = field(default=0, metadata={"help": "train a CorrectionHead of this rank, and nothing else"})
    dtype: str = field(default="float32", metadata={"help": "of the model's weights; --bf16 multiplies in bf16"})
    cache: str = field(default=str(cache_folder()), metadata={"help": "where models and texts of pip are kept"})

    def __post_init__(self) -> None:
        _need(self.model is not None, "model", "be given", None, "Name a folder, or smollm2")
        least_of = {"max_length": 2, "held_out": 0, "served_k": 1, "lora_rank": 0, "correction_rank": 0}
        for name, least in least_of.items():
            _need(getattr(self, name) >= least, name, f"be at least {least}", getattr(self, name), "Raise it")
        one = not (self.lora_rank and self.correction_rank)
        _need(one, "correction_rank", "be 0 with lora_rank", self.correction_rank, "Give one of the two")
        dtypes = ("float32", "bfloat16", "float16")
        _need(self.dtype in dtypes, "dtype", f"be one of {', '.join(dtypes)}", self.dtype, "Pick one of these")
        stored, served = self.stored, self.served
        if served:
            with naming("train", "teacher"):
                checked_url(str(self.teacher))
        other, relation = self.served_model, "come with a server's address as teacher"
        _need(served or other is None, "served_model", relation, other, "Leave it")
        _need(bool(self.text) != stored, "text", "be given, but not with a store", self.text, "Name texts, or a store")
        only = not (self.assistant_only and self.completion_only)
        _need(only, "completion_only", "come without assistant_only", True, "Give one of the two")
        _need(self.limit is None or self.limit >= 1, "limit", "be at least 1", self.limit, "Raise it")
        for name in ("assistant_only", "completion_only", "packing", "limit"):
            chosen = getattr(self, name)
            _need(not (stored and chosen), name, "come with texts", f"{chosen} with a store", "Capture with it instead")
        _need(not (self.packing and self.principles), "packing", "come without principles", True, "Give one of the two")
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
    def only(self) -> str | None:
        """Whose tokens alone count."""
        return "assistant" if self.assistant_only else "completion" if self.completion_only else None

    @property
    def served(self) -> bool:
        """Whether the teacher is a server's address."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))

    @property
    def stored(self) -> bool:
        """Whether the teacher is a store."""
        from ..store.manifest import MANIFEST

        return self.teacher is not None and os.path.exists(Path(self.teacher) / MANIFEST)  # False for no name of a file


def read(path: Path, known: Collection[str]) -> dict[str, Any]:
    """A YAML file of names and values; ValueError, naming the file, where it is none, and the key that is not known or
    holds what no flag takes."""
    file = Source("train", path, "See dft-kernels train --help")
    given = file.yaml()
    for name, value in given.items():
        if name not in known:
            plain = isinstance(name, str) and name.isidentifier() and len(name) < 80
            near = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
            relation = f"be a key of {path} that there is"
            _need(False, name if plain else shown(name), relation, "none of that name", f"Did you mean {near}?")
        if isinstance(value, dict) and name in Job.__dataclass_fields__:
            file.fail(name, "be a value or a list of values", shown(value))
        for one in value if isinstance(value, list) else ():
            flag = isinstance(one, str) and file.typed(name, one, str).startswith("-")
            if flag or not isinstance(one, (str, int, float)):
                file.fail(name, "hold numbers, and texts that do not begin with '-'", shown(one))
        if isinstance(value, str):
            file.typed(name, value, str)
    return given


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
