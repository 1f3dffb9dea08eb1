"""bench/effect.py: the whole study in miniature, and that its page registers what it does."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import effect_arms
import pytest
from target_texts import WORDS, documents
from test_results import PAGES, ROOT, load
from tiny_models import far, tiny_encoder, word_tokenizer

from dft_kernels.commands import main as cli
from dft_kernels.evaluation.metrics import METRICS


@pytest.fixture
def bench() -> Any:
    return load("effect")


def test_the_page_registers_the_arms_and_the_metrics(bench: Any) -> None:
    page = PAGES["docs/effect.md"]
    tables = [part.partition("\n\n")[0] for part in page.split("| arm |")[1:]]  # the study's, and the mendings'
    named = {line.split("|")[1].strip() for table in tables for line in table.splitlines()[2:]}
    starred = {name.rstrip("*") for name in named if name.endswith("*")}
    groups: dict[str, list[str]] = {}
    for arm in bench.ARMS:
        group, _, part = arm.name.partition(": ")
        if arm.tested:
            groups.setdefault(group, []).append(part)
    rows = {f"{group}: {', '.join(parts)}" if parts != [""] else group for group, parts in groups.items()}
    assert {name.rstrip("*") for name in named} == rows
    assert {arm.name for arm in bench.ARMS if arm.seeds == 3} == starred
    metrics = {metric.name for metric in METRICS}
    assert set(bench.NAMED) <= metrics
    assert len(set(bench.NAMED)) == 8
    assert f"{effect_arms.STEPS} optimiser steps of {bench.BATCH} sequences of {bench.LENGTH} tokens" in page
    assert all(rate in page for rate in bench.RATES)
    assert f"steps, in bf16: {bench.RATE}." in page
    results = ROOT / "bench" / "results" / "effect-cpu.csv"
    assert results.exists() == ("<!-- table: bench/results/effect-cpu.csv effect -->" in page)
    for text in (page, PAGES["docs/index.md"]):
        assert results.exists() != ("no result" in " ".join(text.split()))


def row(arm: str, halved: int, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "beside": "SFT, best sampling", "tried": 1, "halved": halved, "retention": 0.0, **more}


def test_the_bar(bench: Any) -> None:
    """Five metrics, a point of retention, a twentieth of time; not met where one part fails, unknown where one is."""
    rows = [row("terms", at < 5) for at in range(8)]
    assert bench.bar(rows, {"terms": 1.04})["terms"] == {"halved": 5, "retention": 0.0, "time": 1.04, "met": True}
    assert bench.bar(rows, {"terms": 1.06})["terms"]["met"] is False
    assert bench.bar(rows, {})["terms"]["met"] is None
    assert bench.bar(rows[1:], {})["terms"]["met"] is False
    assert bench.bar([{**one, "retention": -1.1} for one in rows], {"terms": 1.0})["terms"]["met"] is False
    assert bench.bar([{**one, "retention": ""} for one in rows], {"terms": 1.0})["terms"]["met"] is None
    for source, its in (("SFT", "refined"), ("terms", "terms, refined")):  # what their models know and took
        some = [{**one, "arm": its, "retention": ""} for one in rows]
        assert bench.bar(some, {"terms": 1.0})[its]["met"] is None
        found = bench.bar([*some, {**rows[0], "arm": source, "tried": 0}], {"terms": 1.0})[its]
        assert found == {"halved": 5, "retention": 0.0, "time": 1.0, "met": True}
    assert bench.bar([{**one, "beside": "LAMBADA: SFT"} for one in rows], {}) == {}


def test_no_arm_is_asked_what_it_was_trained_on(bench: Any) -> None:
    asked = {arm.name: arm.tasks for arm in bench.ARMS}
    assert asked["SFT"] == asked["terms"] == effect_arms.TASKS
    assert all("lambada" not in tasks for name, tasks in asked.items() if name.startswith("LAMBADA"))
    controls = {arm.beside for arm in bench.ARMS}
    assert not any(bench.BY_NAME[name].tried for name in controls)


def test_mendings_are_a_family_of_their_own(bench: Any) -> None:
    mended = [arm for arm in bench.ARMS if arm.name.startswith("mended: ")]
    assert [arm.beside for arm in mended] == ["SFT"] * 3
    assert not any(arm.beside == "SFT" for arm in bench.ARMS if arm not in mended)
    assert bench.bar([{**row(arm.name, 1), "beside": arm.beside} for arm in mended], {}) == {}
    (witness,) = (arm for arm in mended if arm.witness)
    assert witness.takes == ("SFT",)


def test_what_a_model_writes_too_little_of_is_chosen(bench: Any) -> None:
    """Of two kinds of sequences, that which the model does not write; each once, in their order."""
    import effect_witness

    draw = random.Random(0)
    kinds = {at: " ".join(f"word{draw.randrange(45) + 45 * (at % 2)}" for _ in range(12)) for at in range(80)}
    tokenizer = word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *(f"word{n}" for n in range(90))])
    model, encoder = far(), tiny_encoder(tokenizer)
    low = [text for at, text in kinds.items() if at % 2 == 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            effect_witness, "continuations", lambda model, tokenizer, prompts, length, seed: tokenizer(
                low[: len(prompts)], add_special_tokens=False)["input_ids"],
        )  # fmt: skip
        found = effect_witness.chosen([" ".join(kinds.values())], model, tokenizer, encoder, 12, 4, 20, 30)
    places = [list(kinds.values()).index(text) for text in found]
    assert places == sorted(set(places))
    assert len(places) == 30
    assert sum(at % 2 for at in places) > 20
    again = effect_witness.chosen([" ".join(kinds.values())], model, tokenizer, encoder, 12, 4, 20, 30)
    assert len(again) == 30
    with pytest.raises(ValueError, match="effect: texts must hold 90 sequences, got 80"):
        effect_witness.chosen([" ".join(kinds.values())], model, tokenizer, encoder, 12, 4, 20, 90)


def test_seeds_come_one_after_another(bench: Any) -> None:
    runs = [(arm.name, seed) for arm, seed in bench.seeds_first(["terms", "SFT", "refined"])]
    assert runs == [("SFT", 0), ("terms", 0), ("refined", 0), ("SFT", 1), ("terms", 1), ("SFT", 2), ("terms", 2)]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_a_study_of_four_arms(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From novels to a table; a second run does nothing again."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer(WORDS)
    far(vocab_size=len(WORDS)).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    sizes = {"PILOT": 2, "LENGTH": 24, "COUNT": 24, "PROMPT": 4, "RATES": ("1e-3", "1e-2")}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr("effect_arms.TASKS", ())
    monkeypatch.setattr(bench, "NAMED", tuple(name for name in bench.NAMED if "MMD" not in name))
    monkeypatch.setattr(bench, "documents_of", lambda *_: ("", ["\n\n".join(documents(60, at)) for at in range(6)]))
    monkeypatch.setattr(bench.room, "GRID", ((1.0, 1.0, 0.0), (0.7, 1.0, 0.0)))
    monkeypatch.setattr(bench.Study, "start", lambda self, model: str(tmp_path / "tiny"))
    monkeypatch.setattr(bench.Study, "encoder", lambda self: None)
    arms = [replace(bench.BY_NAME[name], seeds=min(2, bench.BY_NAME[name].seeds), steps=4)
            for name in ("start", "SFT", bench.BEST, "terms", "refined")]  # fmt: skip
    monkeypatch.setattr(bench, "ARMS", tuple(arms))
    for module in ("effect", "effect_arms"):
        monkeypatch.setattr(f"{module}.BY_NAME", {arm.name: arm for arm in arms})
    ran: list[str] = []

    def command(self: Any, *arguments: str, log: str) -> None:
        ran.append(arguments[0])
        assert cli.main([*arguments]) == 0

    monkeypatch.setattr(bench.Study, "command", command)
    study = bench.Study(tmp_path / "study", tmp_path / "cache", tmp_path / "results/effect")
    for turn in range(3):
        study.prepare()
        bench.pilot(study)
        bench.train(study, [])
        bench.validate(study)
        bench.test(study, [])
        bench.compare(study)
        if turn == 0:
            done = list(ran)
        if turn == 1:  # another machine, without the models
            out = (tmp_path / "study").rename("before") / "models/SFT-0"
            ran.append("--")
    again = ran[len(done) + 1 :]
    assert ran == [*done, "--", *again]
    assert sorted(again) == ["target", "train", "train"]  # the pilot, which is kept nowhere
    assert done.count("train") == 2 + 2 + 2  # rates, then two arms by two seeds
    assert done.count("target") == done.count("gap") == 1
    assert not list((tmp_path / "before").rglob("checkpoint-*"))
    with (tmp_path / "results/effect-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {arm.name for arm in arms}
    assert {row["metric"] for row in rows} <= set(bench.NAMED)
    with pytest.raises(ValueError, match=r"(?s)^effect: .*-0 must be made by .*1e-9.*, got .*Name another --folder\.$"):
        study.train(arms[1], 0, out, "1e-9", 4)
    (out / bench.MADE).unlink()
    with pytest.raises(ValueError, match=r"got something unknown\. Name another"):
        study.train(arms[1], 0, out, bench.RATE, 4)
    monkeypatch.setattr("effect_records.RATE", "1e-9")
    with pytest.raises(ValueError, match=r"registered must be as bench/effect_arms\.py is, got another rate\. "):
        bench.compare(study)
    table = load("summaries").effect_table(rows).splitlines()
    assert len(table) == 2 + len(arms) + 2
    assert table[3].startswith("| SFT, 2 | ")
    known = [row for row in rows if row["arm"] == bench.BEST and row["other"]]  # of some there are too few
    assert known
    assert [(float(row["difference"]), row["closer"]) for row in known] == [(0.0, "0")] * len(known)
    assert {row["seeds"] for row in rows if row["arm"] in ("SFT", "terms")} == {"2"}
    assert {row["held_out"] != "" for row in rows if row["arm"] in ("start", bench.BEST, "refined")} == {False}
