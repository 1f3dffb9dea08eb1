"""bench/effect.py: the whole study in miniature, and that its page registers what it does."""

from __future__ import annotations

import contextlib
import csv
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import effect_arms
import pytest
import torch
from target_texts import WORDS, documents
from test_results import PAGES, ROOT, load
from tiny_models import far, tiny_encoder, word_tokenizer

from dft_kernels.commands import main as cli
from dft_kernels.evaluation.metrics import METRICS
from dft_kernels.targets import target_file
from dft_kernels.terms import TokenL2, noise_floor


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


def test_the_page_says_what_came_out(bench: Any) -> None:
    page = " ".join(PAGES["docs/effect.md"].split())
    with (ROOT / "bench" / "results" / "effect-cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [{**one, "tried": int(one["tried"]), "halved": int(one["halved"])} for one in rows]
    for one in numbers:
        one["retention"] = one["retention"] and float(one["retention"])
    costs = bench.Records(ROOT / "bench/results/effect").costs()
    assert {one["met"] for one in bench.bar(numbers, costs).values()} == {False}
    assert "**The bar is missed, by every arm.**" in page
    closer = [one["arm"] for one in rows if one["closer"] == "1"]
    assert {arm: closer.count(arm) for arm in closer} == {"LAMBADA: terms": 5, "LAMBADA: rollouts": 6}
    assert "closer on five of the eight metrics, rollouts on six" in page
    assert {one["metric"] for one in rows if one["halved"] == "1"} == {"sentence length, W1"}
    assert {one["arm"] for one in rows} == {arm.name for arm in bench.ARMS if arm.tested}
    people = {one["metric"]: float(one["people"]) / float(one["floor"]) for one in rows}
    told = [f"{people[f'token L2, {n}-grams']:.2f}" for n in (1, 2, 3)]
    assert "people lie at {}, {} and {} floors of people (medians".format(*told) in page
    sft = {one["metric"]: float(one["other"]) / float(one["floor"]) for one in rows if one["arm"] == bench.SFT}
    left = {name for name in sft if sft[name] > 1 and sft[name] / 2 > people[name]}
    assert left == {"MMD², embeddings", "distinct-2", "punctuation rates, L1"}
    own = [one for one in numbers if one["arm"] == one["beside"] and one["retention"] != ""]
    assert {one["arm"]: one["retention"] for one in own} == {"LAMBADA: SFT": 0, "Gemma: SFT": 0}


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


def test_the_cost_of_rollouts_is_of_all_steps(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They come every fourth step: the median of steps does not see them, the mean does."""

    def train(study: Any, arm: Any, *_: Any, log: str) -> None:
        study.log(log).parent.mkdir(parents=True, exist_ok=True)
        seconds = [{"SFT": 2.0, "terms": 3.0}.get(arm.name, 2.0)] * 12
        seconds[:2] = [50.0, 50.0]
        seconds[3::4] = [18.0 if arm.name == "rollouts" else seconds[-1]] * 3
        logs = [
            {"loss": "1", "epoch": at, "tokens_per_second": bench.BATCH * bench.LENGTH / one, "peak_memory_gb": "4"}
            for at, one in enumerate(seconds)
        ]
        study.log(log).write_text("".join(f"{one}\n" for one in logs))

    monkeypatch.setattr(bench.Study, "train", train)
    study = bench.Study(tmp_path / "study", tmp_path / "cache", tmp_path / "kept")
    assert study.records.costs() == {}
    study.kept.mkdir()
    bench.cost(study)
    assert study.records.costs() == {"SFT": 1, "terms": 1.5, "constraint": 1, "distilled": 1, "rollouts": 1}
    assert study.records.costs("mean_s") == {"SFT": 1, "terms": 1.5, "constraint": 1, "distilled": 1, "rollouts": 3}
    drawn = load("effect_drawn")
    monkeypatch.setattr(drawn, "KEPT", study.records)
    _, lines, said = drawn.cost()
    assert lines[-1] == ["rollouts", "1.00", "3.00", "1.00"]
    assert said.startswith("Over SFT's, 2.00 s and 4.00 GB; of each round, medians of 3; ")


def test_no_arm_is_asked_what_it_was_trained_on(bench: Any) -> None:
    asked = {arm.name: arm.tasks for arm in bench.ARMS}
    assert asked["SFT"] == asked["terms"] == effect_arms.TASKS
    assert all("lambada" not in tasks for name, tasks in asked.items() if name.startswith("LAMBADA"))
    controls = {arm.beside for arm in bench.ARMS}
    assert not any(bench.BY_NAME[name].tried for name in controls)


def test_mendings_are_a_family_of_their_own(bench: Any) -> None:
    mended = [arm for arm in bench.ARMS if arm.name.startswith("mended: ")]
    assert [arm.beside for arm in mended] == ["SFT"] * 4
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


def test_what_a_model_expects_is_of_its_own_distributions(tmp_path: Path) -> None:
    """Their mean's distance to a target, over that of as many of the text's own tokens."""
    import effect_expected

    text, length, count = "\n\n".join(documents(60, 1)), 24, 12
    (tmp_path / "target.txt").write_text("\n\n".join(documents(60, 2)))
    tokenizer, out = word_tokenizer(WORDS), tmp_path / "target.safetensors"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ("target", "build", "--text", tmp_path / "target.txt", "--tokenizer", tmp_path / "tokenizer", "--out", out)
    assert cli.main([*map(str, words)]) == 0
    model = far(vocab_size=len(WORDS))
    found = effect_expected.expected(model, tokenizer, out, text, length, count)
    assert set(found) == {"TokenL2", "SentenceLength", "PunctuationRate", "PunctuationGap", "NGrams"}

    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)
    assert len(ids) > count
    some = ids[torch.linspace(0, len(ids) - 1, count).long()]
    with torch.no_grad():
        mean = model(some).logits[:, :-1].double().softmax(-1).mean((0, 1))
    unigram = target_file.load(out)["unigram"].double()
    labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
    term = TokenL2(unigram.float(), squared=True)
    floor = noise_floor(term, ids, labels, count * (length - 1))["TokenL2"]
    assert floor is not None
    assert found["TokenL2"] == pytest.approx(float((mean - unigram).square().sum()) / floor, rel=1e-4)


def test_tables_of_what_the_terms_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    effect_drawn = load("effect_drawn")

    def run(shift: float, **expected: float) -> Any:
        logs = [{"hard_loss": 3.0, "rollout_A": step + shift, "rollout_cosine": 0.1 * shift} for step in range(10)]
        return SimpleNamespace(trained=logs, expected=expected)

    both = [run(1.0, A=0.5, B=1.0), run(2.0)]
    plain = SimpleNamespace(trained=[{"hard_loss": 3.0, "term_A": 1.0}], expected={"A": 3.0, "B": 4.0})
    refined = SimpleNamespace(trained=[], expected={})
    named = (("rollouts", both), ("SFT", [plain]), ("refined", [refined]))
    monkeypatch.setattr(effect_drawn, "drawn", lambda: [(SimpleNamespace(name=name), its) for name, its in named])
    head, lines, _ = effect_drawn.read()
    assert head == ["model", "`A`", "`B`"]
    assert lines == [["rollouts", "0.50", "1.00"], ["SFT", "3.00", "4.00"]]
    head, lines, _ = effect_drawn.own()
    assert head == ["trained", "`A`", "cosine of halves"]
    assert lines == [["rollouts", "2.5e+03 → 9.5e+03", "0.15"]]


def test_logs_of_a_training_that_was_stopped(tmp_path: Path) -> None:
    """Of a step that was taken again, the last."""
    import effect_records

    lines = [
        "chatter", *(f"{{'loss': '{loss}', 'hard_loss': '{loss}', 'learning_rate': '1e-4', 'epoch': '{epoch}'}}"
        for loss, epoch in ((3.0, 0.1), (2.5, 0.2), (2.0, 0.3), (2.4, 0.2), (2.1, 0.3), (1.9, 0.4))),
    ]  # fmt: skip
    (tmp_path / "a.log").write_text("\n".join(lines))
    logs = effect_records.logged(tmp_path / "a.log")
    assert effect_records.losses(logs) == [{"hard_loss": loss} for loss in (3.0, 2.4, 2.1, 1.9)]


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
        often = ("--logging_steps", "1") if arguments[0] == "train" else ()
        self.log(log).parent.mkdir(parents=True, exist_ok=True)
        with self.log(log).open("a") as out, contextlib.redirect_stdout(out):
            assert cli.main([*arguments, *often]) == 0

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
    for arm in arms:
        run = study.records.run(arm, 0)
        assert (run.held_out is not None) == (arm.name in ("SFT", "terms"))
        assert len(run.trained) == (4 if arm.name in ("SFT", "terms") else 0)
        assert all(("term_TokenL2" in one) == (arm.name == "terms") for one in run.trained)
        assert set(run.expected) == ({"TokenL2", "SentenceLength", "PunctuationRate", "PunctuationGap", "NGrams"}
                                     if arm.of is None else set())  # fmt: skip
    assert study.records.run(arms[1], 1).expected == {}
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
