"""`dft-kernels sample` on a tiny model: the same text every time, shown as it is drawn, beside itself, and kept."""

from __future__ import annotations

import _thread
import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from target_texts import WORDS, documents
from terminals import Terminal
from tiny_models import far, word_tokenizer

from dft_kernels.commands import main as cli
from dft_kernels.commands.printing import plain
from dft_kernels.generation.settings import Settings

PROMPTS = ["The cat sat", "It was"]
STEPS = ["--refine", "made", "--bound", "0.2", "--style", "made=0.5", "--style-base", "other", "--top-p", "0.9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("sample")
    far(vocab_size=len(WORDS), eos_token_id=1).save_pretrained(at / "model")
    word_tokenizer(WORDS).save_pretrained(at / "model")
    for seed, name in enumerate(("made", "other")):
        (at / f"{name}.txt").write_text("\n\n".join(documents(60, seed)))
        build = ["target", "build", "--tokenizer", str(at / "model"), "--text", str(at / f"{name}.txt")]
        assert cli.main([*build, "--out", str(at / name)]) == 0
    return at


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(folder)
    capsys.readouterr()
    return folder


def sample(*more: str, prompts: list[str] = PROMPTS) -> int:
    return cli.main(["sample", "model", "--prompt", *prompts, "--length", "12", *more])


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_where_there_is_no_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--seed", "3", "--out", "one.jsonl") == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = records(here / "one.jsonl")
    lines = said.out.splitlines()
    assert lines[:4] == [
        line
        for prompt, one in zip(PROMPTS, found, strict=True)
        for line in (f"prompt: {prompt}", f"model: {one['text']}")
    ]
    assert re.search(r"distinct-2 +\S [01]\.\d", said.out)
    assert [(one["prompt"], one["seed"], one["length"]) for one in found] == [(PROMPTS[0], 3, 12), (PROMPTS[1], 4, 12)]
    assert all(0 < one["tokens"] <= 12 and one["entropy"] > 0 and one["kl"] == 0 for one in found)
    assert sample("--seed", "3", "--out", "two.jsonl") == 0
    assert records(here / "two.jsonl") == found
    assert sample("--seed", "4", "--out", "two.jsonl", prompts=PROMPTS[1:]) == 0  # its own file is replaced
    assert records(here / "two.jsonl") == found[1:]


def test_beside_itself_with_other_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(*STEPS, "--compare", "--out", "compared.jsonl") == 0
    said = capsys.readouterr().out
    found = records(here / "compared.jsonl")
    for one in found[:2]:
        assert f"\nmodel, {'with these settings' if one['kl'] else 'as it is'}: {one['text']}" in said
    assert [one["kl"] > 0 for one in found] == [False, True] * 2
    assert found[1]["settings"]["style"] == ["made", 0.5]
    assert found[0]["settings"]["style"] is None
    assert {one["seed"] for one in found[:2]} == {0}
    for words in (
        "distinct-1",
        "entropy, nats a token",
        "KL from the model",
        "at the bound of 0.2",
        "sentence end",
        "--native",
    ):
        assert words in said
    assert sample("--out", "plain.jsonl") == 0
    assert "KL from the model" not in capsys.readouterr().out  # nothing was set
    assert [one["text"] for one in records(here / "plain.jsonl")] == [one["text"] for one in found[::2]]


def test_a_terminal_sees_it_grow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    try:
        assert sample("--diversity", "0.1", "--compare", "--out", "terminal.jsonl") == 0
    finally:
        said = terminal.said()
    assert said.count("model, as it is") >= 2 * 2 + 1  # while it grows, and at the end, of each prompt; and of all
    for one in records(here / "terminal.jsonl"):
        assert one["text"].strip().split(" ")[0] in said


def test_beams_find_the_same_with_any_seed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("1", "2"):
        assert sample("--beams", "3", *STEPS, "--style", "made=3", "--seed", seed, "--out", f"beams{seed}.jsonl") == 0
    found = records(here / "beams1.jsonl")
    assert [one["text"] for one in found] == [one["text"] for one in records(here / "beams2.jsonl")]
    assert [(one["entropy"], one["kl"]) for one in found] == [(None, None)] * 2
    assert f"model: {found[0]['text']}" in capsys.readouterr().out
    assert sample("--beams", "3", "--out", "beams1.jsonl") == 0
    assert [one["text"] for one in records(here / "beams1.jsonl")] != [one["text"] for one in found]


def test_the_likeliest_tokens(here: Path) -> None:
    for seed in ("1", "2"):
        assert sample("--temperature", "0", "--seed", seed, "--out", f"greedy{seed}.jsonl") == 0
    texts = [[one["text"] for one in records(here / f"greedy{seed}.jsonl")] for seed in (1, 2)]
    assert texts[0] == texts[1]


def test_mistakes_are_one_line_before_a_model_is_read(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "theirs.jsonl").write_text('{"text": "somebody\'s"}\n')
    (here / "text.jsonl").write_text("words\n")
    files = sorted(here.rglob("*"))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    for more, said in (
        (["--refine", "literary"], "--refine: .*tokenizer_sha256 must be"),
        (["--style", "made=1"], "--style-base: .*tokenizer_sha256 must be"),
        (["--style", "made=inf"], "--style must be a finite number, got 'inf'"),
        (["--style", "made"], "--style must be NAME=GAMMA, got 'made'"),
        (["--style", "nobody=1"], "--style: .*be a preset"),
        (["--refine", "made", "--bound", "-1"], "--bound must be at least 0, got -1"),
        (["--native", "made"], "--native must come with refine"),
        (["--style-base", "made"], "--style-base must come with style"),
        (["--diversity", "0.1", "--entropy-temperature", "1"], "steps must hold one step of entropy"),
        (["--diversity", "0.1", "--temperature", "0"], "steps must hold no temperature with the likeliest token"),
        (["--diversity", "0.1", "--beams", "2"], "steps must hold no temperature with beams"),
        (["--compare"], "--compare must stand beside a setting, got none"),
        (["--compare", "--beams", "2"], "--compare must stand beside a setting"),
        (["--length", "62"], "--length must be, with the prompt, at most 64 tokens, the model's positions, got a"),
        (["--out", "theirs.jsonl"], "--out must be a new file, or one that this command wrote, got theirs.jsonl"),
        (["--out", "text.jsonl"], "--out must be a new file, or one that this command wrote"),
        (["--out", "new.txt"], "--out must end in .jsonl"),
    ):
        assert sample(*more) in (1, 2), more
        error = capsys.readouterr().err
        assert re.search(said, error), error
        assert error.count("\n") == 1
    assert sample(prompts=[""]) == 1
    assert "--prompt must hold a token" in capsys.readouterr().err
    assert sorted(here.rglob("*")) == files


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests that a shell has started with & ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_draws(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the second prompt is gone on with: the first one's text is kept, and no thread goes on."""

    class Interrupts(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 2 and input_ids[0, 0] == WORDS.index("It"):
                _thread.interrupt_main()
            return scores

    monkeypatch.setattr(Settings, "steps", lambda *_: [Interrupts()])
    assert sample("--out", "interrupted.jsonl") == 130
    said = capsys.readouterr()
    assert said.err == "dft-kernels sample: stopped\n"
    (kept,) = records(here / "interrupted.jsonl")
    assert said.out == f"prompt: {PROMPTS[0]}\nmodel: {kept['text']}\n"
    assert "Stream" not in [one.name for one in threading.enumerate()]


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    assert plain("a\x1b[2Jb\r\n\u202ec é", "\n") == "a\\x1b[2Jb\\r\n\\u202ec é"
    assert plain("a\nb") == "a\\nb"
