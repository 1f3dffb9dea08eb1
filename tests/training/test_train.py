"""`dft-kernels train` and `sample`: the configuration, a run in every form, an interruption, and mistakes."""

from __future__ import annotations

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

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file
from tiny_models import WORDS, tokenizer  # noqa: F401 - a fixture
from tiny_models import far as tiny
from two_processes import on_two

from dft_kernels.commands import capture as command
from dft_kernels.commands import sample
from dft_kernels.training import train
from dft_kernels.training.config import parse, parser

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
    code = train.main(arguments)
    about = out / train.ABOUT
    return code, json.loads(about.read_text()) if about.exists() else {}


def test_a_file_and_flags_over_it(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: smollm2\ntext: [a.txt, b.txt]\nlength: 99\nlearning_rate: 1e-4\nbf16: true\nteacher: null\n"
        "divergence: reverse_kl\ntemperature: 2\nuse_cpu: true\n"
    )
    job, options, _ = parse([str(file), "--length", "77", "--matching-every=3", f"--output_dir={tmp_path / 'o'}"])
    assert (job.model, job.text, job.length, job.teacher) == ("smollm2", ["a.txt", "b.txt"], 77, None)
    assert (options.learning_rate, options.bf16, options.divergence) == (1e-4, True, "reverse_kl")
    assert (options.temperature, options.matching_every, options.num_train_epochs) == (2.0, 3, 1.0)


def test_help_has_every_name_its_default_and_meaning() -> None:
    said = " ".join(parser().format_help().split())
    for words in (
        "--correction_rank", "train a CorrectionHead of this rank, and nothing else (default: 0)",
        "--hard_weight", "of the cross-entropy, in steps of matching (default: 0.1)",
        "--gradient_accumulation_steps", "(default: 2e-05)",
    ):  # fmt: skip
        assert words in said


def test_a_running_teacher_and_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--text", *texts(folder)]
    kept = ["--out", str(folder / "store"), "--length", "16", "--dtype", "float32"]
    assert command.main(["--model", str(folder / "teacher"), *kept, *given]) == 0
    found = {}
    for name, more in {
        "running": ["--teacher", str(folder / "teacher"), *given],
        "store": ["--teacher", str(folder / "store")],
    }.items():
        code, about = run(folder, *more)
        assert code == 0
        found[name] = about["held_out"]
        (folder / "out" / train.ABOUT).unlink()
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
    if adapted == "lora":
        pytest.importorskip("peft")
    more = [] if adapted == "whole" else [f"--{adapted}_rank", "4"]
    code, about = run(folder, "--text", *texts(folder), *more)
    assert code == 0
    assert about["held_out"]["after"]["cross_entropy"] < about["held_out"]["before"]["cross_entropy"]
    assert about["base"] == str(folder / "student")
    out = folder / "out"
    files = {"lora": "adapter_model.safetensors", "correction": train.CORRECTION_FILE, "whole": "model.safetensors"}
    assert [name for name, file in files.items() if (out / file).exists()] == [adapted]
    model, _, base = sample.load(str(out), None, folder)
    assert base == str(folder / "student")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        changed = model(input_ids=ids).logits - tiny()(input_ids=ids).logits
    assert float(changed.norm()) > 0
    capsys.readouterr()
    assert sample.main([str(out), "--prompt", WORDS[3], f"{WORDS[6]} {WORDS[9]}", "--length", "5"]) == 0
    said = capsys.readouterr().out
    assert "prompt" in said
    assert "distinct-n" in said
    assert sample.main([str(out), "--text", *texts(folder)[:2], "--length", "3", "--temperature", "0"]) == 0


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
    assert "correction_rank 0 for 2" in said
    assert about["job"]["correction_rank"] == 0  # nothing was touched
    assert run(folder, "--text", *texts(folder))[0] == 0  # the same job: at its end already


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each one clear line, before anything is loaded or written."""
    (tmp_path / "bad.yaml").write_text("model: x\nlerning_rate: 1\n")
    (tmp_path / "list.yaml").write_text("- model\n")
    student, text = str(folder / "student"), texts(folder)[0]
    out = ["--output_dir", str(tmp_path / "none"), "--use_cpu"]
    for arguments, said in {
        (str(tmp_path / "bad.yaml"),): "lerning_rate must be a key of .* Did you mean learning_rate?",
        (str(tmp_path / "list.yaml"),): "must hold names and values, got list",
        (str(tmp_path / "missing.yaml"),): "must be a readable YAML file",
        ("--modle", "x"): "--modle must be a flag that there is, got none of that name. Did you mean --model?",
        ("--text", text): "model must be given",
        ("--model", student): "text must be given, but not with a store",
        ("--model", student, "--text", text, "--length", "1"): "length must be at least 2, got 1",
        ("--model", student, "--text", text, "--principles", text): "principles must come with a teacher that is run",
        ("--model", student, "--text", text, "--lora_rank", "2", "--correction_rank", "2"): "must be 0 with lora_rank",
        ("--model", student, "--text", text, "--divergence", "kl"): "divergence must be one of forward_kl",
        ("--model", student, "--text", text): "must hold more than the 16 sequences that are held out, got 1",
        ("--model", student, "--text", text, "--teacher", "nowhere", "--held_out", "0"): "--teacher must be a folder",
        ("--model", "nowhere", "--text", text): "--model must be a folder or name that transformers loads",
    }.items():
        assert train.main([*arguments, *out]) == 1
        assert re.search(said, capsys.readouterr().err), said
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        train.main(["--model", student, "--text", text, "--max_steps", "many", *out])
    assert "invalid int value: 'many'" in capsys.readouterr().err
    for arguments, said in {
        (student,): "--prompt or --text must be given",
        (student, "--prompt", "x", "--length", "0"): "--length must be positive, got 0",
        (student, "--prompt", "x", "--top-p", "0"): "--top-p in (0, 1], got 1.0, 0.0",
        ("nowhere", "--prompt", "x"): "--model must be a folder or name",
    }.items():
        assert sample.main(list(arguments)) == 1
        assert said in capsys.readouterr().err


def on_both(folder: Path) -> None:
    """What each of two processes runs."""
    arguments = ["--model", str(folder / "student"), "--text", *texts(folder), "--length", "16", *FAST]
    assert train.main([*arguments, "--output_dir", str(folder / "two"), "--per_device_train_batch_size", "4"]) == 0


def test_two_processes_are_one(folder: Path) -> None:
    """DDP's: the same sequences a step, the same result; one of them writes and speaks."""
    code, alone = run(folder, "--text", *texts(folder), "--per_device_train_batch_size", "8")
    assert code == 0
    on_two(__file__, folder, "on_both")
    both = json.loads((folder / "two" / train.ABOUT).read_text())["held_out"]
    for when in ("before", "after"):
        assert both[when]["cross_entropy"] == pytest.approx(alone["held_out"][when]["cross_entropy"], rel=1e-4)
    assert ["saved in" in (folder / f"said-{rank}.txt").read_text() for rank in range(2)] == [True, False]
