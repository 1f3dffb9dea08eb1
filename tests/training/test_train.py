"""`dft-kernels train` and `sample`: the configuration, a run in every form, an interruption, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import WORDS, tokenizer  # noqa: F401 - a fixture
from tiny_models import far as tiny
from two_processes import on_two

from dft_kernels.commands import main as cli
from dft_kernels.commands.train import GROUPS, parser
from dft_kernels.materials.sources import ABOUT, trained_model
from dft_kernels.models.correction import CORRECTION_FILE
from dft_kernels.training.config import Job
from dft_kernels.training.trainer import DFTConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
FAST = ["--use_cpu", "--max_steps", "6", "--learning_rate", "3e-2", "--logging_steps", "2", "--held_out", "6"]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:  # noqa: F811 - the fixture
    """A student, a teacher, and texts that repeat themselves."""
    for name, more in (("student", {}), ("teacher", {"hidden_size": 24})):
        tiny(**more).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [" ".join(WORDS[(start + 3 * n) % 90] for n in range(40)) for start in range(40)]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.txt").write_text(line)
    (tmp_path / "principles.txt").write_text(" ".join(WORDS[:5]))
    return tmp_path


def texts(folder: Path) -> list[str]:
    return [str(folder / f"{number}.txt") for number in range(40)]


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    out = folder / "out"
    arguments = ["--model", str(folder / "student"), "--output_dir", str(out), "--length", "16", *FAST, *more]
    code = cli.main(["train", *arguments])
    about = out / ABOUT
    return code, json.loads(about.read_text()) if about.exists() else {}


def test_a_file_and_flags_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: smollm2\ntext: [a.txt, b.txt]\nmax_length: 99\nlearning_rate: 1e-4\nbf16: true\nteacher: null\n"
        "divergence: reverse_kl\ntemperature: 2\nuse_cpu: true\nmax_steps: -1\n"
    )
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    monkeypatch.chdir(tmp_path)
    flags = ["--max-length", "77", "--matching-every=3", f"--output_dir={tmp_path / 'o'}"]
    found = parser().parse_args(["job.yaml", *flags])
    job, options = found.job, found.training
    assert (job.model, job.text, job.max_length, job.teacher) == ("smollm2", ["a.txt", "b.txt"], 77, None)
    assert (options.learning_rate, options.bf16, options.divergence) == (1e-4, True, "reverse_kl")
    assert (options.temperature, options.matching_every, options.num_train_epochs) == (2.0, 3, 1.0)


def test_help_is_ours_first_and_names_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(parser().format_help().split())
    for words in (
        "--correction_rank", "train a CorrectionHead of this rank, and nothing else (default: 0)",
        "--hard_weight", "of the cross-entropy, in steps of matching (default: 0.1)",
        "--gradient_accumulation_steps", "(default: 2e-05)",
    ):  # fmt: skip
        assert words in said
    ours = [field.name for field in dataclasses.fields(Job)]
    ours += [name for name in DFTConfig.__annotations__ if name != "remove_unused_columns"]
    shown = [name for names in GROUPS.values() for name in names]
    assert set(ours) <= set(shown)
    assert len(shown) == len(set(shown))
    mine, rest = said.split("other arguments of transformers.TrainingArguments, explained by --help-all: ")
    assert all(f"--{name} " in mine for name in shown)
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init} - set(shown)
    assert set(rest.split(", ")) == {f"--{name}" for name in theirs}
    with pytest.raises(SystemExit):
        parser().parse_args(["--help-all"])
    whole = " ".join(capsys.readouterr().out.split())
    explained = next(f for f in dataclasses.fields(transformers.TrainingArguments) if f.name == "weight_decay")
    assert explained.metadata["help"] in whole
    assert explained.metadata["help"] not in said


def test_a_running_teacher_and_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--text", *texts(folder)]
    kept = ["--out", str(folder / "store"), "--length", "16", "--dtype", "float32"]
    assert cli.main(["capture", "--model", str(folder / "teacher"), *kept, *given]) == 0
    found = {}
    for name, more in {
        "running": ["--teacher", str(folder / "teacher"), *given],
        "store": ["--teacher", str(folder / "store")],
    }.items():
        code, about = run(folder, *more)
        assert code == 0
        found[name] = about["held_out"]
        (folder / "out" / ABOUT).unlink()
        for checkpoint in (folder / "out").glob("checkpoint-*"):
            checkpoint.rename(folder / f"{name}-checkpoint")
    assert found["store"]["after"]["kl"] < found["store"]["before"]["kl"]
    for when in ("before", "after"):  # hidden states in bf16
        assert found["store"][when]["kl"] == pytest.approx(found["running"][when]["kl"], rel=2e-2)
    said = capsys.readouterr().out
    assert "KL(teacher || model)" in said
    assert "tokens/s, peak memory" in said
    assert "teacher_agreement" in said


def test_principles_are_the_teachers_alone(folder: Path) -> None:
    given = ["--text", *texts(folder), "--teacher", str(folder / "student")]
    more = ["--principles", str(folder / "principles.txt"), "--hard_weight", "0", "--max_steps", "30"]
    code, about = run(folder, *given, *more)
    assert code == 0
    before, after = about["held_out"]["before"]["kl"], about["held_out"]["after"]["kl"]
    assert 0 < after < before


@pytest.mark.parametrize("adapted", ["lora", "correction", "whole"])
def test_what_is_saved_is_sampled(folder: Path, adapted: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if adapted == "whole" else [f"--{adapted}_rank", "4"]
    code, about = run(folder, "--text", *texts(folder), *more)
    assert code == 0
    assert about["held_out"]["after"]["cross_entropy"] < about["held_out"]["before"]["cross_entropy"]
    assert about["base"] == str(folder / "student")
    out = folder / "out"
    files = {"lora": "adapter_model.safetensors", "correction": CORRECTION_FILE, "whole": "model.safetensors"}
    assert [name for name, file in files.items() if (out / file).exists()] == [adapted]
    saved = trained_model(str(out), None)
    assert saved.base == str(folder / "student")
    model, _ = saved.load(folder)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        changed = model(input_ids=ids).logits - tiny()(input_ids=ids).logits
    assert float(changed.norm()) > 0
    capsys.readouterr()
    assert cli.main(["sample", str(out), "--prompt", WORDS[3], f"{WORDS[6]} {WORDS[9]}", "--length", "5"]) == 0
    said = capsys.readouterr().out
    assert f"prompt: {WORDS[6]} {WORDS[9]}\n{folder / 'student'}: " in said
    assert "distinct-2" in said
    assert cli.main(["sample", str(out), "--text", *texts(folder)[:2], "--length", "3", "--temperature", "0"]) == 0


@pytest.mark.parametrize("adapted", ["lora", "correction", "whole"])
def test_mixed_precision_is_measured_as_it_is_saved(folder: Path, adapted: str) -> None:
    """Accelerate's autocast about the forward is of training alone: held-out text is read by the weights as they are,
    before and after."""
    more = ["--text", *texts(folder), *([] if adapted == "whole" else [f"--{adapted}_rank", "4"])]
    code, about = run(folder, *more, "--bf16", "true")
    assert code == 0
    before, after = (about["held_out"][when]["cross_entropy"] for when in ("before", "after"))
    assert after < before
    (folder / "out").rename(folder / "trained")
    saved = str(folder / "trained" if adapted != "lora" else folder / "merged")
    if adapted == "lora":
        model, its = trained_model(str(folder / "trained"), None).load(folder)
        model.merge_and_unload().save_pretrained(saved)
        its.save_pretrained(saved)
    if adapted != "correction":
        assert cli.main(["train", "--model", saved, *more[:41], "--output_dir", str(folder / "again"), "--length", "16",
                         *FAST, "--max_steps", "1"]) == 0  # fmt: skip
        again = json.loads((folder / "again" / ABOUT).read_text())["held_out"]["before"]["cross_entropy"]
        assert again == pytest.approx(after, rel=1e-5)


def test_interrupted_it_goes_on(folder: Path) -> None:
    """SIGINT in the middle: a checkpoint where it stopped; the same command ends where an undisturbed one does."""
    whole, parts = folder / "whole", folder / "parts"
    fixed = [
        sys.executable, "-m", "dft_kernels.commands.main", "train", "--model", str(folder / "student"),
        "--text", *texts(folder),
        "--length", "16", "--use_cpu", "--max_steps", "60", "--logging_steps", "1", "--held_out", "0",
        "--learning_rate", "1e-2",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([*fixed, "--output_dir", str(whole)], check=True, env=environment, capture_output=True)
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*fixed, "--output_dir", str(parts)], env=environment, **piped) as running:
        assert running.stdout is not None
        said = ""
        for line in running.stdout:
            said += line
            if "'loss'" in line:
                running.send_signal(signal.SIGINT)
                break
        said += running.stdout.read()
    assert running.returncode == 130, said
    assert "the same command goes on from its checkpoint" in " ".join(said.split())
    (checkpoint,) = parts.glob("checkpoint-*")
    stopped = int(checkpoint.name.split("-")[1])
    assert 0 < stopped < 60
    done = subprocess.run(
        [*fixed, "--output_dir", str(parts)], check=True, env=environment, capture_output=True, text=True
    )
    assert f"going on from {checkpoint}" in "".join(done.stdout.split("\n"))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_another_job_are_not_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--text", *texts(folder))[0] == 0
    assert list((folder / "out").glob("checkpoint-*"))
    capsys.readouterr()
    code, about = run(folder, "--text", *texts(folder), "--correction_rank", "2")
    assert code == 1
    assert "hold checkpoints of this job, got" in (said := capsys.readouterr().err)
    assert "correction_rank=0 in place of 2" in said
    assert about["job"]["correction_rank"] == 0  # nothing was touched


def test_a_job_at_its_end_is_not_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a finished job Trainer would take one step more; more steps, asked for, are gone on to."""
    assert run(folder, "--text", *texts(folder))[0] == 0
    weights = (folder / "out/model.safetensors").read_bytes()
    capsys.readouterr()
    code, about = run(folder, "--text", *texts(folder), "--learning_rate", "1e-2")
    assert code == 0
    assert f"nothing to do: {folder / 'out'} holds all 6 steps of this job. " in capsys.readouterr().out
    assert (folder / "out/model.safetensors").read_bytes() == weights
    assert about["held_out"]["after"]
    assert run(folder, "--text", *texts(folder), "--max_steps", "8")[0] == 0
    assert (folder / "out/checkpoint-8").is_dir()
    assert (folder / "out/model.safetensors").read_bytes() != weights
    by_epochs = ("--text", *texts(folder), "--max_steps", "-1", "--num_train_epochs")
    for epochs, idle in (("4", False), ("4", True), ("5", False)):
        assert run(folder, *by_epochs, epochs)[0] == 0
        assert ("nothing to do" in capsys.readouterr().out) == idle


def test_a_tokenizer_of_more_tokens_than_a_model_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is written, of the model, a teacher, a store, and where a model is only drawn from."""
    tiny(vocab_size=20).save_pretrained(folder / "small")
    transformers.AutoTokenizer.from_pretrained(folder / "student").save_pretrained(folder / "small")
    small, given = str(folder / "small"), ("--text", *texts(folder))
    store = str(folder / "store")
    assert cli.main(["capture", "--model", str(folder / "teacher"), *given, "--out", store, "--quiet"]) == 0
    capsys.readouterr()
    for command, said in (
        (["train", "--model", small, *given], "text must be of ids below 20, the model's vocab_size, got"),
        (["train", "--model", str(folder / "student"), "--teacher", small, *given],
         "text must be of ids below 20, the teacher's vocab_size, got"),
        (["train", "--model", small, "--teacher", store], "teacher must be of ids below 20, the model's"),
        (["sample", small, "--prompt", WORDS[80]], "prompt must be of ids below 20, the model's vocab_size, got"),
    ):  # fmt: skip
        more = [*FAST, "--output_dir", str(folder / "none")] if command[0] == "train" else []
        assert cli.main([*command, *more]) == 1, command
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (folder / "none").exists()


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each one clear line, before anything is loaded or written; those of a file by its name and key."""
    text, student = texts(folder)[0], str(folder / "student")
    known = f"model: {student}\ntext: [{text}]\n"
    files = {
        "bad": "model: x\nlerning_rate: 1\n", "list": "- model\n", "short": f"{known}max_length: 1\n",
        "many": f"{known}max_steps: many\n", "weight": f"{known}target: literary\nterms: [token_l2=much]\n",
        "away": f"{known}teacher: nowhere\nheld_out: 0\n", "kl": f"{known}divergence: kl\n", "none": "text: [nofile]\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff")
    file = {name: str(tmp_path / f"{name}.yaml") for name in (*files, "missing", "binary")}
    given = ("--model", student, "--text", text)
    for arguments, said in {
        (file["bad"],): f"lerning_rate must be a key of {file['bad']} .* Did you mean learning_rate\\?$",
        (file["list"],): "list.yaml: the file must hold names and values, got list",
        (file["missing"],): "missing.yaml: the file must be there, got none",
        (str(folder),): f"{folder}: the file must be a readable regular file, got a folder",
        (file["binary"],): "binary.yaml: the file must be UTF-8 text",
        (file["short"],): "short.yaml: max_length must be at least 2, got 1",
        (file["short"], "--length", "0"): " --length must be at least 2, got 0",
        (file["many"],): "many.yaml: max_steps must be a whole number, got 'many'",
        (file["weight"],): "weight.yaml: terms: token_l2 must come as",
        (file["away"],): "away.yaml: teacher must be a folder",
        (file["kl"],): "kl.yaml: divergence must be one of",
        (file["none"],): "none.yaml: text must name readable UTF-8 files, got nofile",
        ("--modle", "x"): "--modle must be a flag that there is, got none of that name. Did you mean --model?",
        ("--text", text): "--model must be given",
        ("--model", student): "--text must be given, but not with a store",
        (*given, "--principles", text): "--principles must come with a teacher that is run",
        (*given, "--lora_rank", "2", "--correction-rank", "2"): "--correction-rank must be 0 with lora_rank",
        (*given, "--correction_rank", "2", "--push_to_hub", "true"): "--push_to_hub must be false with correction_rank",
        (*given, "--target", "literary"): "--target must be given together with terms",
        given: "--text must hold more than the 16 sequences that are held out, got 1",
        (*given, "--teacher", "nowhere", "--held_out", "0"): "--teacher must be a folder or name that transformers",
        (*given, "--teacher", "no/where/", "--held_out", "0"): "--teacher must be a folder with config.json, got 'no/",
        ("--model", "smolm2", "--text", text): "--model must be a name that there is, got 'smolm2'. Did you mean",
        (*given, "--length", "9", "stray"): "stray must follow a flag that takes it",
    }.items():
        assert cli.main(["train", *arguments, "--output_dir", str(tmp_path / "none"), "--use_cpu"]) in (1, 2)
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(said, err), (said, err)
    assert not (tmp_path / "none").exists()


def on_both(folder: Path) -> None:
    """What each of two processes runs."""
    arguments = ["--model", str(folder / "student"), "--text", *texts(folder), "--length", "16", *FAST]
    more = ["--output_dir", str(folder / "two"), "--per_device_train_batch_size", "4"]
    assert cli.main(["train", *arguments, *more]) == 0


def test_two_processes_are_one(folder: Path) -> None:
    """DDP's: the same sequences a step, the same result; one of them writes and speaks."""
    code, alone = run(folder, "--text", *texts(folder), "--per_device_train_batch_size", "8")
    assert code == 0
    on_two(__file__, folder, "on_both")
    both = json.loads((folder / "two" / ABOUT).read_text())["held_out"]
    for when in ("before", "after"):
        assert both[when]["cross_entropy"] == pytest.approx(alone["held_out"][when]["cross_entropy"], rel=1e-4)
    assert ["saved in" in (folder / f"said-{rank}.txt").read_text() for rank in range(2)] == [True, False]
