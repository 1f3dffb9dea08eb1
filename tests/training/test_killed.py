"""`capture`, `store join` and `train` under kill -9 at random places: the same command goes on and ends as an unbroken
one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from killed import PLACES, run, until_it_ends
from safetensors.torch import load_file
from tiny_models import WORDS, far, word_tokenizer

from dft_kernels.commands import main as cli
from dft_kernels.store.reader import Store
from dft_kernels.training.progress import TERMS_FILE
from dft_kernels.training.train import last_checkpoint

KEPT = pytest.mark.kept(where=lambda place: place == 3)


class Unbroken(NamedTuple):
    """A command without its folder, the folder of an undisturbed run, and what that run did there."""

    line: list[str]
    folder: Path
    events: int

    @classmethod
    def of(cls, line: list[str], folder: Path) -> Unbroken:
        code, events, said = run([*line, str(folder)], folder)
        assert code == 0, said
        return cls(line, folder, events)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its target, and texts."""
    at = tmp_path_factory.mktemp("killed")
    far().save_pretrained(at / "model")
    word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *WORDS]).save_pretrained(at / "model")
    for number in range(60):
        (at / f"{number}.txt").write_text(" ".join(WORDS[(number + 3 * n) % 90] for n in range(7 + number % 30)))
    target = ["target", "build", "--tokenizer", str(at / "model"), "--out", str(at / "t.safetensors")]
    assert cli.main([*target, "--text", *texts(at)]) == 0
    return at


def texts(given: Path) -> list[str]:
    return [str(given / f"{number}.txt") for number in range(60)]


def capture_line(given: Path, kind: str) -> list[str]:
    return ["capture", "--model", str(given / "model"), "--text", *texts(given), "--kind", kind, "--k", "5",
            "--max-length", "16", "--shard-rows", "150", "--batch-tokens", "40", "--device", "cpu"]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=["hidden", "topk"])
def captured(given: Path, request: Any) -> Unbroken:
    return Unbroken.of([*capture_line(given, request.param), "--out"], given / f"whole-{request.param}")


@pytest.fixture(scope="module")
def trained(given: Path) -> Unbroken:
    line = ["train", "--model", str(given / "model"), "--text", *texts(given), "--max_length", "16", "--use_cpu",
            "--max_steps", "12", "--save_steps", "2", "--save_total_limit", "2", "--logging_steps", "1",
            "--held_out", "4", "--learning_rate", "1e-2", "--target", str(given / "t.safetensors"),
            "--terms", "token_l2=1", "--output_dir"]  # fmt: skip
    return Unbroken.of(line, given / "whole")


@KEPT
@pytest.mark.parametrize("place", range(PLACES))
def test_capture_is_bit_for_bit_the_unbroken_one(captured: Unbroken, place: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    until_it_ends([*captured.line, str(out)], out, captured.events, place)
    assert files(out) == files(captured.folder)
    Store(out)  # by its checksums


@pytest.fixture(scope="module")
def shards(given: Path) -> list[Unbroken]:
    """Of a capture on two machines."""
    line = [*capture_line(given, "hidden"), "--shard"]
    return [Unbroken.of([*line, f"{index}/2", "--out"], given / f"shard-{index}") for index in range(2)]


@pytest.fixture(scope="module")
def joined(shards: list[Unbroken], given: Path) -> Unbroken:
    line, out = ["store", "join"], given / "joined"
    code, events, said = run([*line, str(out), *(str(one.folder) for one in shards)], out)
    assert code == 0, said
    return Unbroken(line, out, events)


@KEPT
@pytest.mark.parametrize("place", range(PLACES))
def test_a_shard_is_bit_for_bit_the_unbroken_one(shards: list[Unbroken], place: int, tmp_path: Path) -> None:
    out, unbroken = tmp_path / "out", shards[place % 2]
    until_it_ends([*unbroken.line, str(out)], out, unbroken.events, place)
    assert files(out) == files(unbroken.folder)


@KEPT
@pytest.mark.parametrize("place", range(PLACES))
def test_a_join_is_bit_for_bit_the_unbroken_one(
    joined: Unbroken, shards: list[Unbroken], place: int, tmp_path: Path
) -> None:
    out, before = tmp_path / "out", [files(one.folder) for one in shards]
    until_it_ends([*joined.line, str(out), *(str(one.folder) for one in shards)], out, joined.events, place)
    assert files(out) == files(joined.folder)
    assert [files(one.folder) for one in shards] == before


@KEPT
@pytest.mark.parametrize("place", range(PLACES))
def test_train_ends_at_the_unbroken_weights(trained: Unbroken, place: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    until_it_ends([*trained.line, str(out)], out, trained.events, place)
    for name in ("", "checkpoint-12"):
        found, whole = (load_file(folder / name / "model.safetensors") for folder in (out, trained.folder))
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], value) for key, value in whole.items())
    terms = [torch.load(folder / "checkpoint-12/distribution_terms.pt") for folder in (out, trained.folder)]
    assert torch.equal(*(one["term"]["running"] for one in terms))
    assert not list(out.glob("*.part"))


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    for number, state in ((8, '{"global_step": 8}'), (9, '{"global_step": 9}'), (10, '{"global_s'), (11, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-8" / TERMS_FILE).touch()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert last_checkpoint(tmp_path, terms=True) == str(tmp_path / "checkpoint-8")
    assert last_checkpoint(tmp_path / "none") is None
