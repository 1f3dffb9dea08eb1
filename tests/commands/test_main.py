"""`dft-kernels` itself: one screen, completion, a reader that stops, paths of another system."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dft_kernels
from dft_kernels.commands import main as cli

ROOT = Path(dft_kernels.__file__).parents[1]


def test_alone_it_says_what_it_can_do_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in cli.COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dft-kernels {dft_kernels.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_a_shell_without_completion(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-completion", *arguments]) == 2
    assert "SHELL must be one of bash, zsh, tcsh, got " in capsys.readouterr().err


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 1
    assert capsys.readouterr().err.endswith("Run pip install 'dft-kernels[completion]'.\n")


def test_bash_completes_commands_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    few = ("capture", "doctor", "demo", "target", "train")  # without the seconds that the imports of others take
    monkeypatch.setattr(cli, "COMMANDS", {name: cli.COMMANDS[name] for name in few})
    assert cli.main(["--print-completion", "bash"]) == 0
    script = tmp_path / "dft-kernels"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        typed = " ".join(map(repr, ("dft-kernels", *words)))
        ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_dft_kernels; echo ${{COMPREPLY[@]}}"
        command = [shutil.which("bash") or "bash", "-c", f"source {script}; {ask}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert completed("do") == ["doctor"]
    assert completed("target", "b") == ["build", "blend"]
    assert completed("capture", "--bat") == ["--batch-tokens"]
    assert completed("train", "--loss_g") == ["--loss_gradient_error"]
    assert set(completed("")) >= set(cli.COMMANDS)


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`dft-kernels doctor | head -1`"""
    command = [sys.executable, "-m", "dft_kernels.commands.main", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""


@pytest.mark.parametrize(
    ("typed", "own"),
    [(r"C:\runs\mine.safetensors", "/mnt/c/runs/mine.safetensors"), (r"runs\a.safetensors", "runs/a.safetensors")],
)
def test_a_path_of_windows_does_not_become_a_name(
    typed: str, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("A sentence. " * 100)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["target", "build", "--text", "text.txt", "--out", typed]) == 2
    assert f"--out must have / between its folders, got {typed}. Write {own}." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
