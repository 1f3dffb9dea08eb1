"""Every flag of every command with wrong values: one line that names the flag as it was typed, and nothing done."""

from __future__ import annotations

import argparse
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import SMALL, tokenizer  # noqa: F401 - a fixture
from transformers.hf_argparser import string_to_bool

from dft_kernels.commands import arguments, bench, target
from dft_kernels.commands import main as cli
from dft_kernels.commands.arguments import Checked, Number, OutputFile, Whole
from dft_kernels.generation.refiner import TOWARDS
from dft_kernels.materials.sources import check_text
from dft_kernels.targets import target_file

MISSING, FOLDER, FILE, BINARY = "no/such/thing", "folder", "file.txt", "binary.txt"
BASES: dict[tuple[str, ...], list[str]] = {  # what each command needs, before a wrong value
    ("demo",): ["--text", FILE],
    ("train",): ["--model", "model", "--text", FILE, "--output_dir", "new", "--use_cpu"],
    ("sample",): ["model", "--prompt", "x"],
    ("play",): ["model"],
    ("capture",): ["--model", "model", "--text", FILE, "--out", "new"],
    ("store", "info"): [FOLDER],
    ("store", "verify"): [FOLDER],
    ("store", "join"): ["new", FOLDER],
    ("target", "build"): ["--text", FILE, "--out", "new"],
    ("target", "list"): [],
    ("target", "show"): ["literary"],
    ("target", "blend"): ["literary", "satire", "--weights", "0.5", "0.5", "--out", "new"],
    ("target", "presets"): ["--tokenizer", "model", "--out", "new"],
    ("gap",): ["model", "--target", "literary", "--text", FILE],
    ("evaluate",): ["model", "--human", FILE, "--out", "new", "--prompt", "4", "--length", "8"],
    ("report",): ["run", "--out", "new.html"],
    ("bench",): ["--device", "cpu"],
    ("info",): [],
    ("doctor",): [],
}
PATHS: dict[Any, list[str]] = {
    arguments.input_file: [MISSING, FOLDER],
    arguments.input_folder: [MISSING, FILE],
    arguments.output_folder: [FILE, f"{FILE}/below"],
    arguments.device: ["nothing", "cpu:x"],
    arguments.shard: ["4/4", "1", "-1/4", "0/0", "0/4/4", "a/b", "", "0.5/1", "1/99999999999"],
    check_text: [MISSING, FOLDER, BINARY],
    target_file.load: [MISSING, FOLDER, BINARY],
    target._check_against: [MISSING, FOLDER, BINARY, f"{MISSING}.safetensors"],
    bench._check_rows: [MISSING, FOLDER, BINARY, FILE],
    bench._check_kept: [FOLDER, BINARY, FILE, f"{FILE}/below"],
}
MODELS = [MISSING, FOLDER, BINARY]
WORDS: dict[str, list[str]] = {  # what is a text for argparse
    "model": MODELS, "base": MODELS, "teacher": [*MODELS, "http://me:key@host", "https://"], "tokenizer": MODELS,
    "encoder": MODELS, "tasks": ["nothing"], "run": [MISSING, FOLDER, BINARY], "target": [MISSING, FOLDER, BINARY],
    "principles": [MISSING, FOLDER, BINARY], "terms": ["nothing=1", "token_l2=much", "token_l2=nan", "token_l2"],
    "rollout_terms": ["nothing=1", "calibration=1", "reference_kl=inf"],
    "divergence": ["nothing"], "temperature_scaling": ["nothing"], "dtype": ["nothing", "int8"],
    "served": ["host:8000", "ftp://host", "http://me:key@host", "http://host?key=1"],
    "loss_backend": ["nothing"], "report_to": ["nothing"],
    "host": ["nowhere.example", "", "127.0.0.1:80", "256.0.0.1"], "token": ["", "too short", "é" * 16, "\n" * 16],
    "style": ["literary", "nothing=1", "literary=much", "literary=nan", "=1", f"{FOLDER}=1", f"{BINARY}=1"],
    "names": ["nothing"], "peer": ["nothing"], "shape": ["1,2", "0,1,1", "a,b,c"],
}  # fmt: skip
OUTSIDE = {  # of ranges that Job and DFTConfig check
    "max_length": "1", "held_out": "-1", "lora_rank": "-1", "correction_rank": "-1", "temperature": "0",
    "teacher_temperature": "-1", "matching_every": "0", "matching_from": "-1", "matching_ramp": "-1",
    "rollout_every": "0", "served_k": "0", "rollout_prompt": "0", "rollout_length": "1", "rollout_samples": "0",
    "label_smoothing_factor": "0.1",
}  # fmt: skip
FREE = {"name", "source", "licence", "commit", "prompt", "served_model"}  # any text is right
BESIDE = {  # what a flag of train does not come without
    "principles": ["--teacher", "model"],
    "target": ["--terms", "token_l2=1"],
    "terms": ["--target", "literary"],
    "rollout_terms": ["--target", "literary"],
}


def chosen(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> list[argparse.Action]:
    """The arguments of a command, or of one of its subcommands."""
    for name in path[1:]:
        (below,) = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        parser = below.choices[name]
    return parser._actions


def wrong_values(action: argparse.Action) -> list[str] | None:
    """None: no value is known to be wrong."""
    kind: Any = action.type.check if isinstance(action.type, Checked) else action.type
    if action.nargs == 0:
        return ["value"]
    if action.dest in WORDS:
        return WORDS[action.dest]
    if action.choices is not None or kind is string_to_bool:
        return ["nothing"]
    if isinstance(kind, Whole):
        limits = [kind.least - 1, kind.most + 1]
        return ["many", "1.5", "nan", "", *map(str, limits)]
    if isinstance(kind, Number):
        below = [kind.least - 1, kind.above, kind.most + 1, kind.below]
        return ["many", "nan", "", *(str(value) for value in below)]  # infinite where there is no limit
    if isinstance(kind, OutputFile):
        return [FOLDER, f"{FILE}/below{kind.suffix}", *(["new.jpg"] if kind.suffix else [])]
    return PATHS.get(kind)


def theirs(path: tuple[str, ...], action: argparse.Action) -> bool:
    """Whether it is a text of transformers' own, which it takes or refuses when it comes to it."""
    if path != ("train",):
        return False
    own = {name for name, field in transformers.TrainingArguments.__dataclass_fields__.items() if field.init}
    return action.dest in own and not isinstance(action.type, (Whole, Number, Checked))


@pytest.fixture
def here(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with what the bases name; no model in it can be loaded."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FILE).write_text("Some words. " * 99)
    (tmp_path / BINARY).write_bytes(b"\xff\xfe\xff\x00")
    transformers.LlamaConfig(**SMALL).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for owner in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        monkeypatch.setattr(owner, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # transformers' own, of arguments that it is to lose
@pytest.mark.parametrize("path", BASES, ids=" ".join)
def test_a_wrong_value_names_its_flag(
    path: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"dft_kernels.commands.{path[0]}")
    monkeypatch.setattr(module, "parser", functools.cache(module.parser))
    files = sorted(here.rglob("*"))
    positional = [a.dest for a in chosen(module.parser(), path) if not a.option_strings]
    for action in chosen(module.parser(), path):
        values = wrong_values(action)
        if values is None:
            assert action.dest in FREE or theirs(path, action), f"{action.dest}: what is wrong for it?"
            continue
        if action.dest in ("help", "what"):
            continue
        for value in [*values, *([OUTSIDE[action.dest]] if path == ("train",) and action.dest in OUTSIDE else [])]:
            line = [*BASES[path], *(BESIDE.get(action.dest, []) if path == ("train",) else [])]
            flag = next((flag for flag in reversed(action.option_strings) if flag.startswith("--")), None)
            if flag is not None:
                line.append(f"{flag}={value}")
            else:
                at = positional.index(action.dest)
                line[at : at + (not line[at].startswith("--"))] = [value]
            code = cli.main([*path, *line])
            out, err = capsys.readouterr()
            assert code in (1, 2), line
            assert err.count("\n") == 1, (line, err)
            assert err.startswith(f"dft-kernels {path[0]}: "), err
            assert (flag or action.dest) in err or (flag is None and value in err), (line, err)
            assert "Traceback" not in err + out
    assert sorted(here.rglob("*")) == files


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    commands = modules - {"__init__", "main", "arguments", "flags", "printing"}
    assert commands == set(cli.COMMANDS) == {path[0] for path in BASES}
    for name in commands:
        assert f"\n  {name} " in said
        module = importlib.import_module(f"dft_kernels.commands.{name}")
        assert callable(module.run)
        assert module.parser().prog == f"dft-kernels {name}"


def test_what_is_not_given_or_not_known(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in {
        "capture": "--model, --text, --out must be given, got none. See dft-kernels capture --help.",
        "sample model": "one of --prompt --text must be given, got none.",
        "sample model --prompt a --text file.txt": "--text must not be given with --prompt, got both. Leave one out.",
        "gap model --tarqet literary": "--tarqet must be a flag that there is, got none of that name. "
        "Did you mean --target?",
        "target build --text": "--text must have at least one value, got none. Add it.",
        "target blend literary --weigths 1": "Did you mean --weights?",
        "target build --out b --assistant_only --completion_only": "--completion_only must not be given with "
        "--assistant-only, got both.",
        "capture --model model --text file.txt --out new --max_length 1": "--max_length must be at least 2, got 1.",
        "capture --model model --text file.txt --out new --length=1": "--length must be at least 2, got 1.",
        "train --model model --text file.txt --max-length 1": "--max-length must be at least 2, got 1.",
        "train --model model --text file.txt --length 1": "--length must be at least 2, got 1.",
        "store info folder more": "more must follow a flag that takes it, got none.",
        "store check folder": "what must be one of 'info', 'verify', 'join', got 'check'. Pick one of these.",
        "target": "what must be given, got none.",
    }.items():
        assert cli.main(line.split()) == 2
        assert said in capsys.readouterr().err


def test_an_interruption_says_what_is_left(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for name, said in {
        "capture": "dft-kernels capture: stopped; the same command goes on in new\n",
        "train": "dft-kernels train: stopped; the same command goes on from its last checkpoint\n",
        "gap": "dft-kernels gap: stopped\n",
    }.items():
        monkeypatch.setattr(importlib.import_module(f"dft_kernels.commands.{name}"), "run", interrupted)
        assert cli.main([name, *BASES[(name,)]]) == 130
        assert capsys.readouterr().err == said


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    for name, extra in (("demo", "finetune"), ("bench", "bench")):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert cli.main([name]) == 1
        said = f"dft-kernels {name}: matplotlib must be installed, got none. Run pip install 'dft-kernels[{extra}]'.\n"
        assert capsys.readouterr().err == said


def test_a_default_of_several_values_is_shown_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    assert f"(default: {' '.join(TOWARDS)})" in " ".join(capsys.readouterr().out.split())
