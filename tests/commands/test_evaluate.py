"""`dft-kernels evaluate` on a tiny model: what it writes, that it goes on, and what it says of wrong input."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from target_texts import WORDS, documents
from tiny_models import far, tokenizer, word_tokenizer  # noqa: F401 - a fixture
from vllm_installed import vllm  # noqa: F401 - a fixture

from dft_kernels.commands import main as cli
from dft_kernels.evaluation import report, results, subject
from dft_kernels.evaluation.metrics import METRICS
from dft_kernels.generation import samples
from dft_kernels.targets import corpus, target_file

COUNT = 24
ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    import random

    monkeypatch.chdir(tmp_path)
    for name, seed in (("start", 0), ("tuned", 1)):
        model = far()
        if seed:
            model.get_output_embeddings().weight.data.mul_(0.5)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    generator = random.Random(0)
    lines = []
    for _ in range(3 * COUNT):
        some = [f"word{generator.randrange(80)}" for _ in range(30)]
        lines.append({"text": ("She " if generator.random() < 0.5 else "He ") + " ".join(some) + "."})
    Path("human.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def evaluate(*more: str, models: tuple[str, ...] = ("start",)) -> int:
    given = ["evaluate", *models, "--human", "human.jsonl", "--count", str(COUNT), "--prompt", "4", "--length", "12"]
    return cli.main([*given, "--encoder", "none", "--out", "out", "--cache", "cache", *more])


def test_a_run_writes_all_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--sweep", "--counterfactual", models=("start", "tuned")) == 0
    said = capsys.readouterr().out
    found = results.load(here / "out")
    assert [model.name for model in found.models] == ["start, best of 8 samplings", "start", "tuned"]
    assert [about.name for about in found.metrics] == [metric.name for metric in METRICS]
    for model in found.models[1:]:
        values = {value.metric: value for value in model.values}
        assert values["token L2, 1-grams"].ratio is not None
        assert values["perplexity"].value is not None
        assert values["MMD², embeddings"].note == "not measured: no encoder was named"
        assert model.sampling == samples.Sampling(count=COUNT, length=12)
        assert model.cost["tokens"] > 0
        assert len(model.texts) == 10
        assert {name: len(bins) for name, bins in model.histograms.items()} == {
            "sentence words": 257,
            "punctuation": 10,
        }
    best = found.models[0]
    assert min(best.sweep, key=lambda one: one.distance).sampling == best.sampling
    assert found.settings["human"] == ["human.jsonl"]
    with (here / "out/evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(METRICS)
    assert {row["temperature"] for row in rows if row["model"] == "start"} == {"1.0"}
    assert "token L2, 1-grams" in said
    assert (
        len(list((here / "out/samples").iterdir())) == 2 + 2 + 7
    )  # swapped ones, and a sweep of 8 of which one is the first


@pytest.fixture
def target(here: Path) -> str:
    """Of other texts of the same tokenizer."""
    own = word_tokenizer(WORDS)
    for name in ("start", "tuned"):
        own.save_pretrained(name)
    lines = [json.dumps({"text": text}) + "\n" for text in documents(3 * COUNT, 1)]
    Path("human.jsonl").write_text("".join(lines))
    made = corpus.build(documents(60), own, name="made", tokenizer_name="tiny")
    return str(target_file.save(made, here / "made.safetensors"))


def test_a_model_stands_beside_itself_with_steps(
    target: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    reading = subject.read
    monkeypatch.setattr(subject, "read", lambda *given, **more: read.append(len(given[3])) or reading(*given, **more))
    steps = ("--refine", target, "--bound", "0.05", "--diversity", "0.1")
    assert evaluate(*steps, "--compare") == 0
    said = capsys.readouterr().out
    assert read == [2 * COUNT, COUNT, COUNT]  # human texts once a model
    whole = results.load(here / "out")
    how = "diversity +0.1, refined to made, 0.05 nats, without native"
    names = ["start", f"start + {how}"]
    assert [model.name for model in whole.models] == names
    sha256 = target_file.fingerprint(target_file.load(target))
    assert whole.models[1].drawn["steps"] == {
        "diversity": 0.1, "refine": {"name": "made", "sha256": sha256}, "bound": 0.05,
        "towards": ["sentences", "punctuation"],
    }  # fmt: skip
    assert "steps" not in whole.models[0].drawn
    assert subject.SPENT not in whole.models[0].cost
    assert whole.models[1].cost[subject.SPENT] > 0.01
    assert "KL from the model" in said
    assert whole.models[0].texts != whole.models[1].texts
    with (here / "out/evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"]: row["steps"] for row in rows} == dict(zip(names, ["", how], strict=True))
    page = report.page([whole])
    assert f"steps of {names[1]}" in page
    assert sha256 in page
    assert "Not all texts were drawn with the same steps" in page

    # a run of either is a part of it, and its file is its own
    before = {one.name: one.read_bytes() for one in (here / "out/samples").iterdir()}
    assert len(before) == 2
    for given, one in (((), whole.models[0]), (steps, whole.models[1])):
        assert evaluate(*given, "--again", "--quiet") == 0
        (alone,) = results.load(here / "out").models
        assert (alone.name, alone.texts, alone.drawn) == (one.name, one.texts, one.drawn)
        assert [value.value for value in alone.values] == pytest.approx([value.value for value in one.values])
    assert {one.name: one.read_bytes() for one in (here / "out/samples").iterdir()} == before
    assert evaluate(*steps[:3], "0.06", "--again") == 1  # a bound of which there are no texts
    assert "Draw them first" in capsys.readouterr().err


def test_a_model_stands_beside_itself_by_another_sampling(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one name, told apart wherever figures stand, none under what is said of the other."""
    monkeypatch.setenv("COLUMNS", "200")
    assert evaluate("--compare", "--temperature", "0.7") == 0
    said = capsys.readouterr().out
    names, ways = ["start (temperature 1)", "start (temperature 0.7)"], ["1, 1, 0", "0.7, 1, 0"]

    def cells(table: str, of: str) -> list[str]:
        line = next(line for line in table.splitlines() if of in line)
        return [cell.strip() for cell in line.replace("│", "|").replace("┃", "|").strip("|").split("|")][1:]

    assert cells(said, "metric") == names
    assert cells(said, "temperature, top-p, min-p") == ways
    assert "temperature 0.7, top-p" not in said
    with (here / "out/evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["model"] for row in rows)) == names
    table = runpy.run_path(str(ROOT / "bench/summaries.py"))["evaluation_table"](rows)
    assert cells(table, "value in floors") == names
    assert cells(table, "temperature, top-p, min-p") == ways
    assert "temperature 1.0" not in table
    one, other = cells(table, "token L2, 1-grams")
    assert one != other


def test_steps_that_cannot_be_are_one_line_before_any_work(
    target: str,
    vllm: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more, said in (
        (("--compare",), "--compare must stand beside a setting, got none. Add one"),
        (("--refine", "literary"), "--refine: "),
        (("--native", target), "--native must come with"),
        (("--diversity", "0.1", "--temperature", "0"), "hold no temperature with the likeliest token"),
        (("--diversity", "0.1", "--engine", "vllm"), "--engine must be transformers beside steps, got vllm."),
    ):
        assert evaluate(*more) == 1, more
        error = capsys.readouterr().err
        assert said in error, error
        assert error.count("\n") == 1
    assert not Path("out").exists()


def test_every_way_is_checked_before_the_first_draws(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("start/generation_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "typical_p": 0.9}))
    assert evaluate("--compare", "--diversity", "0.1") == 1
    assert "beside steps, which they would follow, got typical_p 0.9" in capsys.readouterr().err
    assert not Path("out/samples").exists()


def test_it_goes_on_and_measures_again_without_the_models(here: Path) -> None:
    assert evaluate("--counterfactual", "--quiet") == 0
    first = json.loads((here / "out/evaluation.json").read_text())
    file = next(one for one in (here / "out/samples").iterdir() if "swapped" not in one.name)
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    (here / "out/readings/start-t1-p1-m0.json").unlink()
    assert evaluate("--counterfactual", "--quiet") == 0
    again = json.loads((here / "out/evaluation.json").read_text())
    for one in (first, again):
        one["models"][0].pop("cost")
    assert again == first
    for weights in (here / "start").glob("*.safetensors"):
        weights.write_bytes(b"")
    assert evaluate("--counterfactual", "--again", "--quiet") == 0
    without = json.loads((here / "out/evaluation.json").read_text())
    without["models"][0].pop("cost")
    assert without == first


def test_wrong_input_is_one_line_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_text("")
    for more, said in (
        (("--count", "100"), "--human must hold 200 passages of 16 tokens"),
        (("--human", "empty.txt"), "--human must hold 48 passages"),
        (("--tokenizer", "nothing"), "--tokenizer must be a folder or name"),
        (("--encoder", "start"), "modules.json"),
        (("--slices", "human.jsonl"), "human.jsonl"),
        (("--again",), "Draw them first"),
    ):
        assert evaluate(*more) == 1, more
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert evaluate(models=("start", "start")) == 1
    assert "named once each" in capsys.readouterr().err
    assert not Path("out/samples").exists()


def test_again_is_of_the_same_run_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--counterfactual", "--quiet") == 0
    words = {"groups": {"a": ["word1"], "b": ["word2"]}, "pairs": [["word1", "word2"]]}
    Path("words.json").write_text(json.dumps(words))
    for more in (("--slices", "words.json", "--counterfactual"), ("--seed", "1"), ("--temperature", "0.5")):
        capsys.readouterr()
        assert evaluate("--again", *more) == 1, more
        assert capsys.readouterr().err.count("\n") == 1


def test_a_second_model_is_checked_before_the_first_draws(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("tuned/config.json").read_text())
    Path("tuned/config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    assert evaluate(models=("start", "tuned")) == 1
    error = capsys.readouterr().err
    assert "--length must be, with the prompt, at most 12 tokens, the model's positions, got a sequence of 16." in error
    assert "tuned has no more" in error
    assert not Path("out").exists()


def test_vllm_draws_where_it_is_named(here: Path, vllm: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert evaluate("--engine", "vllm", "--counterfactual", "--quiet") == 0
    assert [started["model"] for started in vllm.STARTED] == ["start"]
    assert not vllm.RUNNING
    drawn = results.load(here / "out").models[0].drawn
    assert drawn["engine"] == "vllm"
    assert drawn["versions"]["vllm"] == "0.0.0"
    assert evaluate("--engine", "vllm", "--counterfactual", "--again", "--quiet") == 0
    for more in ((), ("--again",)):
        capsys.readouterr()
        assert evaluate("--counterfactual", *more) == 1
        error = capsys.readouterr().err
        assert "engine must be" in error
        assert error.count("\n") == 1


def test_what_vllm_lacks_is_one_line_before_any_work(
    here: Path,
    vllm: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("adapted").mkdir()
    Path("adapted/adapter_config.json").write_text("{}")
    for models, more, said in (
        (
            ("start", "adapted"),
            ("--base", "start"),
            "model must be saved whole, got adapted, with adapter_",
        ),
        (("start",), ("--temperature", "3"), "--temperature must be 0, or in [0.01, 2], got 3.0."),
    ):
        assert evaluate("--engine", "vllm", *more, models=models) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    monkeypatch.setattr("dft_kernels.generation.vllm_engine.find_spec", lambda name: None)
    assert evaluate("--engine", "vllm") == 1
    assert "--engine must be installed, got vllm, of which there is no package. Install it" in capsys.readouterr().err
    assert not Path("out").exists()
    assert not vllm.STARTED
