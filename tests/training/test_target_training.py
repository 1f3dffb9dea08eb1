"""Targets of human writing in training: terms of a Target, DFTTrainer with them, and the gap before it."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, far, tiny, tiny_encoder, word_tokenizer
from tokenizers import decoders, pre_tokenizers
from training_runs import config, curve

from dft_kernels.commands import main as cli
from dft_kernels.evaluation import gap
from dft_kernels.loss.functional import shift_labels
from dft_kernels.models.heads import hidden_states, output_layer
from dft_kernels.targets import corpus, target_file
from dft_kernels.targets.target import Target
from dft_kernels.terms import AtMost, Delayed, Entropy, TextMMD, TokenL2, gains, noise_floor
from dft_kernels.training.attach import attach
from dft_kernels.training.target_terms import TERMS, HumanText, Written, terms_of
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
MARKS = (".", ",", "!", "?")


@pytest.fixture
def tokenizer() -> Any:
    """Of words and marks."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *MARKS, *WORDS[:80]]
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return word_tokenizer(words, pre, decoders.WordPiece())


def prose(count: int = 60) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    texts = []
    for _ in range(count):
        sentences = []
        for _ in range(6):
            length = int(torch.randint(3, 9, (1,), generator=generator))
            words = [WORDS[int(n)] for n in torch.randint(0, 80, (length,), generator=generator)]
            words[0], words[1] = words[0].capitalize(), words[1] + ","
            sentences.append(" ".join(words) + ".")
        texts.append(" ".join(sentences))
    return texts


@pytest.fixture
def target(tokenizer: Any) -> Target:
    return corpus.build([text.lower() for text in prose()], tokenizer, name="tiny")


def test_every_name_is_a_term(target: Target) -> None:
    vocab = 100  # a head with padded ids
    given = [f"{name}=0.5" for name in TERMS if name != "sentence_length" or "sentence_end" in target]
    found = terms_of(target, given, vocab, model=far())
    assert len(found.parts) == len(given)
    assert all(by == 0.5 for by, _ in found.parts)
    assert found.vocab == vocab
    for names, said in (
        (["token_l1=1"], "Did you mean token_l2"),
        (["token_l2"], "must come as token_l2=WEIGHT"),
        (["token_l2=nan"], "must come as token_l2=WEIGHT"),
        (["token_l2=infx"], "must come as token_l2=WEIGHT"),
        (["token_l2=0.5x"], "text and model must be given for token_l2=0.5x"),
        (["vocabulary_mmd=1"], "model must be given for vocabulary_mmd"),
        ([], "one term at least"),
    ):
        with pytest.raises(ValueError, match=said):
            terms_of(target, names, vocab)
    with pytest.raises(ValueError, match="must be of at most the model's 50 tokens"):
        terms_of(target, ["token_l2=1"], 50)
    with pytest.raises(ValueError, match="written must be given for text_mmd, got none"):
        terms_of(target, ["text_mmd=1"], vocab, own_text=True)


def test_a_weight_relative_to_cross_entropy_is_of_the_gain(target: Target) -> None:
    """Of the model on the first rows of the text, each name by itself."""
    model = far()
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(0, vocab, (6, 20), generator=torch.Generator().manual_seed(2))
    text = HumanText(ids, shift_labels(ids), 1)
    given = ["punctuation_rate=0.5x", "token_l2=0.25", "unigram_kl=2x", "vocabulary_mmd=3x", "embedding_transport=1x"]
    found = terms_of(target, given, vocab, text, model=model)
    with torch.no_grad():
        hidden = hidden_states(model.eval(), ids)
    for (by, term), times in zip(found.parts, (0.5, None, 2.0, 3.0, 1.0), strict=True):
        (gain,) = gains(term, hidden, output_layer(model).weight, shift_labels(ids), input_ids=ids).values()
        assert by == pytest.approx(0.25 if times is None else times / gain, rel=1e-5)
    term = TextMMD(lambda texts: torch.ones(len(texts), 1), ["a"])
    whole = ["text_mmd=3x", "punctuation_rate=0.5x"]
    of_texts = terms_of(target, whole, vocab, text, own_text=True, model=model, written=Written(term, lambda: 0.2))
    assert [by for by, _ in of_texts.parts] == pytest.approx([15.0, found.parts[0][0]])
    with pytest.raises(ValueError, match=r"text_mmd=3x must be of a term that pulls at the start, got a gain of 0"):
        terms_of(target, whole, vocab, text, own_text=True, model=model, written=Written(term, lambda: 0.0))


def test_a_constraint_is_at_the_floor_in_units_of_the_gain(target: Target) -> None:
    model, draw = far(), torch.Generator().manual_seed(2)
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(0, vocab, (6, 20), generator=draw)
    text = HumanText(ids, shift_labels(ids), 40)
    (weight, bounded), (_, gap) = terms_of(target, ["token_l2=floor", "token_l2=3x"], vocab, text, model=model).parts
    assert isinstance(bounded, AtMost)
    assert weight == 1.0
    assert bounded.bound == noise_floor(gap, *text)["TokenL2"]
    assert terms_of(target, ["token_l2=3x"], vocab, text, model=model).parts[0][0] == 3 / bounded.gain
    with pytest.raises(ValueError, match="text and model must be given for token_l2=floor, got neither or one"):
        terms_of(target, ["token_l2=floor"], vocab, text)


def frequencies() -> torch.Tensor:
    return torch.rand(64, generator=torch.Generator().manual_seed(9)).softmax(0)


def test_trainer_takes_the_steps_of_a_loop_with_terms(store: Any, tmp_path: Path) -> None:
    """Two accumulated batches a step, the running statistics folded in after each step."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0,
               "max_steps": 3, "learning_rate": 0.3}  # fmt: skip
    term = 2.0 * TokenL2(frequencies()) + 0.1 * Entropy(value=2.0)
    batches: list[dict[str, torch.Tensor]] = []

    def collate(items: Any) -> dict[str, torch.Tensor]:
        batches.append(store.collate(items))
        return batches[-1]

    model, data = tiny(), {"train_dataset": store, "data_collator": collate}
    trainer = DFTTrainer(model, config(tmp_path, **options), store, terms=term, **data)
    trainer.train()
    ours = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = tiny()
    attach(plain, hard_weight=0.1)
    delayed = Delayed(term, 0.9)
    for step in (batches[n : n + 2] for n in range(0, 6, 2)):
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
        for batch in step:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            plain(
                **inputs, teacher=store.teacher(batch), num_items_in_batch=items, distribution_terms=delayed
            ).loss.backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.3 * p.grad
                p.grad = None
        delayed.update()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(ours[name], p, rtol=1e-4, atol=1e-5)
    assert delayed.steps == 3
    logged = [entry for entry in trainer.state.log_history if "term_TokenL2" in entry]
    assert len(logged) == 3
    for name, value in delayed.values().items():
        assert float(trainer.terms.values()[name]) == pytest.approx(float(value), rel=1e-4)


def test_resumed_with_terms_it_is_the_same_curve(store: Any, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    runs = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = DFTTrainer(tiny(), config(tmp_path, **options), store, terms=3.0 * TokenL2(frequencies()))
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    for name in ("loss", "term_TokenL2"):
        assert curve(runs[1], name)[-3:] == pytest.approx(curve(runs[0], name)[-3:], rel=1e-5)
    assert torch.allclose(runs[0].terms.running, runs[1].terms.running)
    assert runs[1].terms.steps == 5
    (tmp_path / "out" / "checkpoint-4" / "distribution_terms.pt").unlink()
    with pytest.raises(ValueError, match=r"must hold distribution_terms\.pt of the same kinds of terms .*, got none"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_terms_close_what_they_are_of(store: Any, tmp_path: Path) -> None:
    options = config(tmp_path, max_steps=40, learning_rate=5e-3, terms_decay=0.5, hard_weight=0.0, soft_weight=0.0)
    words = (5 * torch.rand(64, generator=torch.Generator().manual_seed(9))).softmax(0)
    trainer = DFTTrainer(tiny(), options, store, terms=5.0 * TokenL2(words, squared=True))
    trainer.train()
    found = curve(trainer, "term_TokenL2")
    assert found[-1] < 0.5 * found[0]


def test_human_prefixes_are_the_formula(target: Target, tokenizer: Any) -> None:
    model = far()
    passages = gap.windows([text.lower() for text in prose()], tokenizer, 4, 8, 24)
    assert passages.shape == (24, 12)
    found = {one.statistic: one for one in gap.human_prefixes(model, target, passages, batch=5)}
    with torch.no_grad():
        q = model(input_ids=passages).logits[:, :-1].double().softmax(-1)
    labels = passages[:, 1:]
    share = torch.bincount(labels.reshape(-1), minlength=100).double() / labels.numel()
    mean = q.mean((0, 1))
    assert found["unigram, L2"].value == pytest.approx(float((mean - share).norm()), rel=1e-4)
    assert found["unigram, TV"].value == pytest.approx(float((mean - share).abs().sum() / 2), rel=1e-4)
    end = torch.zeros(100, dtype=torch.float64)
    end[: len(target["sentence_end"])] = target["sentence_end"].double()
    rate = float((q @ end).mean() - end[labels].mean())
    assert found["sentence end, rate"].value == pytest.approx(abs(rate), rel=1e-3)
    entropy, ce = -(q * q.log()).sum(-1).mean(), -q.log().gather(-1, labels[..., None]).mean()
    assert found["entropy less cross-entropy"].value == pytest.approx(abs(float(entropy - ce)), rel=1e-4)
    assert all(one.floor > 0 for one in found.values())


def test_verdict_says_where_there_is_nothing_to_close() -> None:
    closed = [gap.Gap(gap.OWN, "a", 1.0, 1.0), gap.Gap(gap.OWN, "b", 0.0, 0.0), gap.Gap(gap.FORCED, "c", 9.0, 2.0)]
    lines = gap.verdict(closed)
    assert lines[0] == "human prefixes: 1 of 1 above 1.5 times their floor: c (4.5)."
    assert lines[1] == "own text: nothing to close: no statistic is 1.5 times its floor."
    assert math.isinf(gap.Gap(gap.OWN, "a", 1.0, 0.0).ratio)


def test_the_command(target: Target, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    target_file.save(target, tmp_path / "tiny.safetensors")
    for number, text in enumerate(prose()):
        (tmp_path / f"{number}.txt").write_text(text.lower())
    texts = [str(tmp_path / f"{number}.txt") for number in range(60)]
    fixed = [str(tmp_path / "model"), "--target", str(tmp_path / "tiny.safetensors"), "--text", *texts]
    more = ["--count", "12", "--prompt", "4", "--length", "16"]
    own = str(tmp_path / "own.safetensors")
    out = ["--csv", str(tmp_path / "new" / "gap.csv"), "--plot", str(tmp_path / "gap.png"), "--own", own]
    assert cli.main(["gap", *fixed, *more, *out]) == 0
    said = capsys.readouterr().out
    assert "model / floor" in said
    assert "own text: " in said
    with (tmp_path / "new" / "gap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["reading"] for row in rows} == {gap.OWN, gap.FORCED}
    assert float(rows[0]["ratio"]) == pytest.approx(float(rows[0]["value"]) / float(rows[0]["floor"]))
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    native, between = target_file.load(own, tokenizer), str(tmp_path / "half.safetensors")
    assert native.about.name == "own"
    assert "temperature 1, top-p 1, seed 0" in native.about.source
    ends = [own, str(tmp_path / "tiny.safetensors")]
    assert cli.main(["target", "blend", *ends, "--gamma", "0.5", "--out", between]) == 0
    half = 0.5 * native["unigram"] + 0.5 * target["unigram"]
    torch.testing.assert_close(target_file.load(between)["unigram"], half)
    assert cli.main(["gap", *fixed, *more, "--count", "4000"]) == 1
    assert "--text must hold 4000 passages of" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["constrained", "weighed", "relative"])
def test_train_towards_a_target(
    how: str, target: Target, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Terms of human text and of the model's own, weighed and at their floors."""
    monkeypatch.setattr("dft_kernels.training.train.encoder", lambda name, cache: tiny_encoder(tokenizer))
    far().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    target_file.save(target, tmp_path / "tiny.safetensors")
    (tmp_path / "all.txt").write_text("\n".join(text.lower() for text in prose()))
    fixed = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "all.txt"), "--target",
             str(tmp_path / "tiny.safetensors"), "--length", "24", "--use_cpu", "--logging_steps", "1",
             "--output_dir", str(tmp_path / "out"), "--held_out", "2", "--learning_rate", "1e-2"]  # fmt: skip
    run = ["--max_steps", "4", "--rollout_length", "6", "--rollout_prompt", "4", "--terms_decay", "0.5"]
    by = {"constrained": "floor", "weighed": "0.5", "relative": "0.5x"}[how]
    terms = ["--terms", f"token_l2={by}", "calibration=0.02"]
    whole = "text_mmd=0.5x" if how == "relative" else "text_mmd=0.3"
    own = ["--rollout_terms", f"punctuation_rate={by}", "reference_kl=0.05", whole]
    assert cli.main(["train", *fixed, *run, *terms, *own]) == 0
    logged = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    named = {name for entry in logged for name in entry if name.startswith(("term_", "rollout_"))}
    want = {"term_TokenL2", "term_Entropy", "rollout_PunctuationRate", "rollout_ReferenceKL", "rollout_TextMMD",
            "rollout_cosine"}  # fmt: skip
    if how == "constrained":
        want |= {f"{name}_{what}" for name in ("term_TokenL2", "rollout_PunctuationRate")
                 for what in ("over_bound", "dual")}  # fmt: skip
    assert named == want
    capsys.readouterr()
    biased = ["--rollout_biased_without_score", "true", "--model", str(tmp_path / "gone")]  # told before it is missed
    for wrong, message in (
        (["--terms", "calibration=floor"], "calibration=floor must have a finite noise floor above 0, got none"),
        (["--terms", "unigram_kl=floor"], "unigram_kl=floor must have a finite noise floor above 0, got inf"),
        (["--rollout_terms", "calibration=1"], "calibration must be one of token_l2, .* of the model's own text"),
        (["--terms", "token_l2=low"], "token_l2 must come as token_l2=WEIGHT, token_l2=0.5x or token_l2=floor"),
        (["--rollout_terms", "reference_kl=1x"], "reference_kl=1x must be of a term that pulls at the start"),
        (["--rollout_terms", "text_mmd=floor"], "text_mmd=floor must have a finite noise floor above 0, got none"),
        (["--rollout_terms", "text_mmd=1", *biased], "rollout_biased_without_score must be false with text_mmd"),
        (["--terms", "text_mmd=1"], "text_mmd must be one of token_l2, .*, got another"),
        ([], "target must be given together with terms or rollout_terms"),
    ):
        assert cli.main(["train", *fixed, "--output_dir", str(tmp_path / "none"), *wrong]) in (1, 2)
        assert re.search(message, capsys.readouterr().err), message
    assert not (tmp_path / "none").exists()
