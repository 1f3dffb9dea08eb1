"""The model card that `dft-kernels train` leaves: what it says, names of any kind, and what it leaves alone."""

from __future__ import annotations

import re
import shlex
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from test_train import FAST, folder, run, texts  # noqa: F401 - a fixture among them
from tiny_models import tokenizer  # noqa: F401 - a fixture of it

from dft_kernels.commands import main as cli
from dft_kernels.commands.train import parser
from dft_kernels.training.card import MARK, Card
from dft_kernels.training.markdown import code, plain
from dft_kernels.training.train import prepare

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


def front(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text().split("---\n")[1])
    assert found == ModelCard.load(path).data.to_dict()
    return found


@pytest.mark.parametrize("adapted", ["lora", "correction", "whole"])
def test_a_run_and_its_card(folder: Path, adapted: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    more = [] if adapted == "whole" else [f"--{adapted}_rank", "4"]
    given = ["--teacher", str(folder / "teacher"), "--divergence", "reverse_kl", "--hub_token", "hf_secret"]
    assert run(folder, "--text", *texts(folder), *given, *more)[0] == 0
    card = folder / "out" / "README.md"
    said, found = card.read_text(), front(card)
    libraries = {"lora": "peft", "correction": "dft-kernels", "whole": "transformers"}
    assert found["library_name"] == libraries[adapted]
    assert found["pipeline_tag"] == "text-generation"
    assert ("lora" in found["tags"]) == (adapted == "lora")
    assert "base_model" not in found  # a folder's path is no name of a hub's, which refuses it
    assert "datasets" not in found
    kinds = {"lora": "LoRA of rank 4", "correction": "CorrectionHead of rank 4", "whole": "all weights"}
    for words in (
        f"| base model | `{folder / 'student'}` |", f"| trained | {kinds[adapted]}, float32 |",
        f"| teacher | `{folder / 'teacher'}` |", f"`{folder / '3.txt'}`", "and 20 more", "of them count",
        "| loss | `reverse_kl`, soft_weight 1.0, hard_weight 0.1, temperature 1.0", "| steps | 6 of 8 rows,",
        "| learning rate | 0.03, linear |", "6 rows, ", "| cross-entropy | ", "KL(teacher || model) | ",
        "- dft-kernels ", "- torch ", "- transformers ",
    ):  # fmt: skip
        assert words in said, words
    assert ("- PEFT " in said) == (adapted == "lora")
    assert "hf_secret" not in said
    again = shlex.split(said.split("## Again\n\n```\n")[1].split("\n```")[0])
    assert again[:2] == ["dft-kernels", "train"]
    made = parser().parse_args(again[2:])
    assert made.job.text == texts(folder)
    assert (made.job.lora_rank, made.job.correction_rank) == (4 * (adapted == "lora"), 4 * (adapted == "correction"))
    assert made.training.divergence == "reverse_kl"
    assert cli.main(again[1:]) == 0  # the same folder: at its end
    assert MARK in card.read_text()
    assert "is yours" not in capsys.readouterr().out


def test_a_store_a_file_and_terms(folder: Path) -> None:  # noqa: F811
    line = ["capture", "--model", str(folder / "teacher"), "--out", str(folder / "store"), "--max_length", "16"]
    assert cli.main([*line, "--text", *texts(folder)]) == 0
    target = ["target", "build", "--tokenizer", str(folder / "student"), "--out", str(folder / "t.safetensors")]
    assert cli.main([*target, "--text", *texts(folder)]) == 0
    (folder / "job.yaml").write_text(
        f"model: {folder / 'student'}\nteacher: {folder / 'store'}\ntarget: {folder / 't.safetensors'}\n"
        f"terms: [token_l2=floor, unigram_kl=0.5]\nmax_length: 16\noutput_dir: {folder / 'out'}\n"
    )
    assert cli.main(["train", str(folder / "job.yaml"), *FAST]) == 0
    said = (folder / "out" / "README.md").read_text()
    for words in (
        "| teacher | store `", "sha256 `", " sequences, ", " rows |", "| terms | `token_l2=floor`, `unigram_kl=0.5`",
        "`term_TokenL2_over_bound`", "`term_UnigramKL`", "--teacher=",
    ):  # fmt: skip
        assert words in said, words
    assert "job.yaml" not in said  # the command says what the file did


@pytest.mark.parametrize("adapted", ["whole", "lora"])
def test_another_hands_files_stay(folder: Path, adapted: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    out = folder / "out"
    out.mkdir()
    own = "---\nbroken: [\n---\nmine\r\n"
    (out / "README.md").write_bytes(own.encode())
    more = ["--lora_rank", "2"] if adapted == "lora" else []
    given = ["--text", *texts(folder), "--held_out", "0", *more]
    for steps in ("6", "7"):
        assert run(folder, *given, "--max_steps", steps)[0] == 0
        assert (out / "README.md").read_bytes() == own.encode()
        assert front(out / "MODEL_CARD.md")["tags"][0] == "dft-kernels"
        assert "README.md is yours and stays; the model card is" in capsys.readouterr().out
    (out / "MODEL_CARD.md").write_text("mine too")
    assert run(folder, *given, "--max_steps", "8")[0] == 0
    assert (out / "MODEL_CARD.md").read_text() == "mine too"
    assert MARK in (out / "MODEL_CARD_2.md").read_text()


def test_names_of_any_kind(folder: Path) -> None:  # noqa: F811
    odd = [folder / name for name in ("a: b#c.txt", "'[x]' `y` |z|.txt", "- *é*\n---\n```.txt", "\udcff.txt")]
    for path in odd:
        path.write_text((folder / "1.txt").read_text() * 5)
    out = folder / "--- `out`: |x|\n# \"'"
    line = ["--model", str(folder / "student"), "--text", *map(str, odd), "--output_dir", str(out), "--length", "16"]
    assert cli.main(["train", *line, *FAST]) == 0
    said, found = (out / "README.md").read_text(), front(out / "README.md")
    assert found["library_name"] == "transformers"
    rows = [line for line in said.splitlines() if line.startswith("| data |")]
    assert len(rows) == 1
    assert rows[0].endswith(" |")
    assert code("`a|b`") == "`` `a\\|b` ``"
    assert plain("*x*\n# `y`") == "\\*x\\* \\# \\`y\\`"
    (line,) = re.findall(r"^## Again\n\n(`{4,})\n(.*)\n\1\n\Z", said, re.M | re.S)  # longer than those of a name
    assert shlex.split(line[1])[5:8] == list(map(str, odd[:3]))


def test_names_of_a_hub_are_metadata(folder: Path) -> None:  # noqa: F811
    ready = parser().parse_args(["--model", str(folder / "student"), "--text", *texts(folder), *FAST,
                                 "--output_dir", str(folder / "out")])  # fmt: skip
    made = prepare(ready.job, ready.training)
    made.job.model, made.job.text = "some/model-1.0", ["hf:some/data:train", "hf:other", "hf:some/data:test", "lambada"]
    named = {"license": "mit", "language": "en", "tags": "x: y", "dataset_tags": ["third"], "model_name": "a: b"}
    made.card.write(**named)
    said, found = (folder / "out" / "README.md").read_text(), front(folder / "out" / "README.md")
    assert found["base_model"] == "some/model-1.0"
    assert found["datasets"] == ["some/data", "other", "third"]
    assert (found["license"], found["language"], found["tags"]) == ("mit", "en", ["dft-kernels", "x: y"])
    assert "\n# a: b\n" in said
    assert "## Again" not in said  # not from the command line


@pytest.mark.parametrize(("adapted", "strategy"), [("whole", "end"), ("lora", "end"), ("whole", "every_save")])
def test_push_to_hub_takes_it_along(
    folder: Path,  # noqa: F811
    adapted: str,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainer's own pushes, whose README.md is the finished card at the end; the checkpoints before have none."""
    from transformers import trainer

    pushed: list[str | None] = []
    done: Future[Any] = Future()
    done.set_result(None)

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            card = Path(folder_path) / "README.md"
            pushed.append(card.read_text() if card.exists() else None)
            return done

    monkeypatch.setattr(trainer, "hf_api", Hub)
    more = ["--lora_rank", "2"] if adapted == "lora" else []
    given = ["--push_to_hub", "true", "--hub_strategy", strategy, "--save_steps", "3", *more]
    assert run(folder, "--text", *texts(folder), *given)[0] == 0
    *before, card = pushed
    assert before == ([] if strategy == "end" else [None] * len(before))
    assert bool(before) == (strategy == "every_save")
    assert card is not None
    assert MARK in card
    assert "| cross-entropy | " in card
    assert len(card.split("| cross-entropy | ")[1].split("\n")[0].split(" | ")) == 2  # before and after


def test_without_a_card_trainers_own_is_made(folder: Path) -> None:  # noqa: F811
    ready = parser().parse_args(["--model", str(folder / "student"), "--text", *texts(folder), *FAST,
                                 "--output_dir", str(folder / "out")])  # fmt: skip
    made = prepare(ready.job, ready.training)
    (folder / "out").mkdir(exist_ok=True)
    made.trainer.create_model_card(model_name="m")
    theirs = (folder / "out" / "README.md").read_text()
    assert "has been generated automatically according to the information the Trainer had access to" in theirs
    assert isinstance(made.card, Card)
    assert made.card.path.name == "README.md"  # which it was, when the run began
