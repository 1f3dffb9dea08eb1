"""`--quiet`, and output that is no terminal: no bars, and of a quiet command no tables; what goes wrong is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from terminals import Terminal
from tiny_models import WORDS, far, tokenizer  # noqa: F401 - a fixture

from dft_kernels.commands import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


@pytest.fixture
def lines(tmp_path: Path, tokenizer: Any) -> dict[str, list[str]]:  # noqa: F811 - the fixture
    """The commands that have it."""
    far().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text, model, target = str(tmp_path / "a.txt"), str(tmp_path / "model"), str(tmp_path / "t.safetensors")
    Path(text).write_text(" ".join(WORDS[3 * n % 90] for n in range(900)))
    assert cli.main(["target", "build", "--tokenizer", model, "--text", text, "--out", target]) == 0
    short = ["--length", "16"]
    return {
        "capture": ["capture", "--model", model, "--text", text, "--out", str(tmp_path / "s"), *short],
        "train": ["train", "--model", model, "--text", text, "--output_dir", str(tmp_path / "out"), "--use_cpu",
                  "--max_steps", "3", "--logging_steps", "1", *short],
        "gap": ["gap", model, "--text", text, "--target", target, "--count", "4", "--prompt", "4",
                "--csv", str(tmp_path / "gap.csv"), *short],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["capture", "train", "gap"])
def test_quiet(
    lines: dict[str, list[str]], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with monkeypatch.context() as patch:
        terminal = Terminal(patch)
        try:
            assert cli.main([*lines[name], "--quiet"]) == 0
        finally:
            said = terminal.said()
    assert said == ""
    assert cli.main([*lines[name], "--quiet", "--text", "nofile"]) in (1, 2)
    assert "nofile" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["capture", "train", "gap"])
def test_no_terminal_no_bars(lines: dict[str, list[str]], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(lines[name]) == 0
    said = capsys.readouterr()
    assert said.out
    assert said.err == ""
    assert name != "train" or "'loss'" in said.out  # its lines stay


TIMES = r"0:\d\d:\d\d left 0:00:00"
BARS = {
    "capture": [rf"the teacher .* 901/901 tokens [\d,.]+ tokens/s {TIMES}"],
    "train": [rf"training .* 3/3 steps [\d,.]+ steps/s {TIMES} [\d,]+ tokens/s, loss [\d.]+", "'loss': '"],
    "gap": [
        rf"{what} .* {count} tokens [\d,.]+ tokens/s {TIMES}"
        for what, count in (("reading", "400/400"), ("writing", "320/320"))
    ],
}


@pytest.mark.parametrize("name", BARS)
def test_a_terminal_has_bars(lines: dict[str, list[str]], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the speed and the time that is left."""
    more = {"capture": ["--batch-tokens", "99"], "gap": ["--count", "20"]}.get(name, [])
    terminal = Terminal(monkeypatch)
    try:
        assert cli.main([*lines[name], *more]) == 0
    finally:
        said = terminal.said()
    for words in BARS[name]:
        assert re.search(words, said), said
