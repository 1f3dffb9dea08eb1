"""What `dft-kernels train` is told: a typed configuration, as a YAML file, as flags, or as a file and flags over it."""

from __future__ import annotations

import difflib
import json
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentError, ArgumentParser
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files import Source, shown
from ..materials.models import cache_folder
from ..materials.sources import MODEL_HELP, TEXT_HELP
from .target_terms import TERMS
from .trainer import DFTConfig

_OTHER_DEFAULTS = {  # than Trainer's, for a command that a person watches
    "output_dir": "dft_out",
    "learning_rate": 2e-5,
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class Job:
    """What is trained on what; the rest is `DFTConfig`'s."""

    _argument_group_name = "model, text, teacher"

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

        named = self.terms or self.rollout_terms
        both = (self.target is None) == (named is None)
        relation = "be given together with terms or rollout_terms"
        _need(both, "target", relation, named or self.target, "Name both, or none")

    @property
    def stored(self) -> bool:
        """Whether the teacher is a store."""
        from ..store.manifest import MANIFEST

        return self.teacher is not None and os.path.exists(Path(self.teacher) / MANIFEST)  # False for no name of a file


def parser() -> transformers.HfArgumentParser:
    """Every field of `Job` and `DFTConfig` as a flag."""
    made = transformers.HfArgumentParser(
        [Job, DFTConfig],
        prog="dft-kernels train",
        usage="dft-kernels train [CONFIG.yaml] [--model NAME] [--text FILE ...] [--teacher STORE|MODEL] [options]",
        description="Train a causal LM towards a teacher's distributions, or by cross-entropy alone. CONFIG.yaml holds "
        "the same names; a flag goes before it. Stopped at any moment, the same command goes on from its checkpoint.",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    made.set_defaults(**_OTHER_DEFAULTS)
    return made


def parse(arguments: list[str]) -> tuple[Job, DFTConfig, dict[str, Any]]:
    """The configuration, typed, and as it was given. ValueError for an unknown key and for a file's value of another
    type; SystemExit for a flag's (with argparse's own words) and for --help."""
    made, known = parser(), {one.name for kind in (Job, DFTConfig) for one in fields(kind) if one.init}
    given: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        file = Source("train", Path(arguments[0]), "See dft-kernels train --help")
        given = _read(file, known)
        arguments = [*_flags(file, given, made), *arguments[1:]]
    names = [one.split("=")[0] for one in arguments if one.startswith("--")]
    for name in names:
        if name not in made._option_string_actions:
            _unknown(name, "a flag", [one for one in made._option_string_actions if one.startswith("--")])
    job, options, rest = made.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    _need(not rest, "arguments", "be CONFIG.yaml and flags", " ".join(rest), "See --help")
    for name, value in (*vars(job).items(), *vars(options).items()):
        _need(value == value or not isinstance(value, float), name, "be a number", value, "See --help")
    return job, options, given


def _read(file: Source, known: set[str]) -> dict[str, Any]:
    given = file.yaml()
    for name in given:
        if name not in known:
            plain = isinstance(name, str) and name.isidentifier() and len(name) < 80
            _unknown(str(name) if plain else shown(name), f"a key of {file.path}", sorted(known))
    return given


def _flags(file: Source, given: dict[str, Any], made: ArgumentParser) -> list[str]:
    """A file's values as flags, so that both are read by the same types; ValueError, by file and name, for others."""
    out = []
    for name, value in given.items():
        if isinstance(value, list):
            if made._option_string_actions[f"--{name}"].nargs not in ("+", "*"):
                file.fail(name, "be one value", shown(value))
            for one in value:
                flag = isinstance(one, str) and file.typed(name, one, str).startswith("-")
                if flag or not isinstance(one, (str, int, float)):
                    file.fail(name, "hold numbers, and texts that do not begin with '-'", shown(one))
            out += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict) and name in Job.__dataclass_fields__:
            file.fail(name, "be a value or a list of values", shown(value))
        elif value is not None:
            text = file.typed(name, value, str) if isinstance(value, str) else value
            out.append(f"--{name}={json.dumps(text) if isinstance(text, dict) else text}")
    made.exit_on_error = False
    try:
        made.parse_known_args(out)
    except ArgumentError as error:
        named = str(error.argument_name).split("/")[0].lstrip("-")
        file.fail(named, "be a value of its type", error.message)
    made.exit_on_error = True
    return out


def _unknown(name: str, what: str, known: list[str]) -> None:
    near = difflib.get_close_matches(name, known, 1, 0.0)
    raise ValueError(f"train: {name} must be {what} that there is, got none of that name. Did you mean {near[0]}?")


def _need(holds: bool, name: str, relation: str, got: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"train: {name} must {relation}, got {got}. {remedy}.")
