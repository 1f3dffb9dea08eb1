"""Rollouts: what is drawn, what `DFTTrainer` does with it, constraints and the stop at the floor in training."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from tiny_models import WORDS as NAMES
from tiny_models import tiny, word_tokenizer
from training_runs import config, curve

from dft_kernels.generation.sampling import roll_out
from dft_kernels.terms import AtMost, Entropy, OnPolicy, PunctuationRate, ReferenceKL, TextMMD, TokenL2
from dft_kernels.training import rollouts
from dft_kernels.training.attach import attach
from dft_kernels.training.rollouts import Reference
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
WORDS = (5 * torch.rand(64, generator=torch.Generator().manual_seed(9))).softmax(0)
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
TOKENIZER = word_tokenizer(["<pad>", "<s>", "</s>", "<unk>", *NAMES[:60]])  # word1 is token 5


def early(texts: Any) -> torch.Tensor:
    """phi of a text: the share of its words that are among the first 15, squared, and whether it has any."""
    share = [sum(word in NAMES[:16] for word in text.split()) / max(len(text.split()), 1) for text in texts]
    return torch.tensor([[one * one, float(bool(text))] for one, text in zip(share, texts, strict=True)])


def sharp(kind: str = "llama") -> Any:
    """A model with opinions, whose texts end now and then."""
    model = tiny(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                draw = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_are_what_the_sampler_saw(kind: str) -> None:
    """The distribution of a row in one forward over the padded texts is that which the token was drawn from."""
    model = sharp(kind)
    drawn = roll_out(model, PROMPTS, 12, 2, seed=3)
    with torch.no_grad():
        z = model.eval()(**drawn.inputs(model)).logits
        for number, prompt in enumerate(PROMPTS):
            live = drawn.target[number] >= 0
            text = drawn.input_ids[number][drawn.attention_mask[number] != 0]
            assert text[: len(prompt)].tolist() == prompt
            alone = model(input_ids=text[None]).logits[0]
            rows = alone[len(prompt) - 1 : len(text) - 1]
            torch.testing.assert_close(z[number][live], rows, rtol=1e-4, atol=1e-4)
            assert drawn.target[number][live].tolist() == text[len(prompt) :].tolist()


def test_a_text_ends_once_and_the_seed_is_the_draw() -> None:
    model = sharp().train()
    before = torch.random.get_rng_state()
    drawn = roll_out(model, [[5, 6]] * 200, 12, 2, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    ended = drawn.target == 2
    assert 5 < int(ended.any(1).sum()) < 200
    assert int(ended.sum(1).max()) == 1
    after = ended.cumsum(1) - ended.long() > 0
    assert bool((drawn.target[after] == -100).all())
    assert not bool(drawn.attention_mask[:, 1:][after[:, :-1]].any())
    assert torch.equal(roll_out(model, [[5, 6]] * 200, 12, 2, seed=0).target, drawn.target)
    assert not torch.equal(roll_out(model, [[5, 6]] * 200, 12, 2, seed=1).target, drawn.target)
    # as often as the model says
    with torch.no_grad():
        q = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    many = roll_out(model, [[5, 6]] * 4000, 1, None, seed=2)
    share = torch.bincount(many.target[:, 1], minlength=64) / 4000
    assert float((share - q).abs().sum()) < 0.2


def test_a_step_is_both_gradients(store: Any, tmp_path: Path) -> None:
    """SGD's step with rollouts: cross-entropy's and that of `OnPolicy.loss` on the same draws, halves averaged."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0,
               "max_steps": 2, "learning_rate": 0.3, "rollout_length": 5, "rollout_samples": 2}  # fmt: skip
    term = 4.0 * TokenL2(WORDS) + 0.5 * ReferenceKL() + 3.0 * TextMMD(early, [NAMES[1]])
    batches: list[Any] = []
    draws: list[Any] = []

    def collate(items: Any) -> dict[str, torch.Tensor]:
        batches.append({name: store.collate(items)[name] for name in ("input_ids", "attention_mask", "labels")})
        return batches[-1]

    def kept(*arguments: Any, **named: Any) -> Any:
        draws.append(roll_out(*arguments, **named))
        return draws[-1]

    model = sharp()
    data = {"train_dataset": store, "data_collator": collate, "rollout_terms": term, "processing_class": TOKENIZER}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "roll_out", kept)
        trainer = DFTTrainer(model, config(tmp_path, **options), None, **data)
        trainer.train()
    assert len(draws) == 4
    plain, reference = sharp(), Reference(sharp())
    attach(plain)
    own = OnPolicy(term, 0.9)
    for step in range(2):
        some = batches[2 * step : 2 * step + 2]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in some)
        for number, batch in enumerate(some):
            plain(**batch, num_items_in_batch=items).loss.backward()
            drawn = draws[2 * step + number]
            assert drawn.target.shape[0] == 4
            for half in (drawn[:2], drawn[2:]):
                given = half.inputs(plain)
                new = [[token for token in row.tolist() if token >= 0 and token != 2] for row in half.target]
                texts = [TOKENIZER.decode(row, skip_special_tokens=True) for row in new]
                named = SimpleNamespace(loss=functools.partial(own.loss, texts=texts))
                found = plain(
                    **given, shift_labels=half.target, teacher=reference(given), distribution_terms=named
                ).loss  # fmt: skip
                (found / 4).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.3 * p.grad
                p.grad = None
        own.update()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert curve(trainer, "rollout_TokenL2")
    assert curve(trainer, "rollout_ReferenceKL")
    assert curve(trainer, "rollout_TextMMD")


def test_it_closes_what_its_own_text_is_off_by(store: Any, tmp_path: Path) -> None:
    """A rate of its own writing moves to the target, resumed or not; the anchor holds it back."""
    classes = torch.zeros(64)
    classes[5:20] = 1
    rate = torch.tensor([0.6])
    options = {"max_steps": 30, "learning_rate": 5e-3, "terms_decay": 0.5, "per_device_train_batch_size": 8,
               "rollout_length": 8, "rollout_every": 1, "save_strategy": "steps", "save_steps": 20}  # fmt: skip

    def train(term: Any, checkpoint: str | None = None, **more: Any) -> DFTTrainer:
        trainer = DFTTrainer(sharp(), config(tmp_path, **{**options, **more}), None, rollout_terms=term,
                             train_dataset=store, data_collator=plain)  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    def plain(items: Any) -> Any:
        return {name: store.collate(items)[name] for name in ("input_ids", "attention_mask", "labels")}

    pulled = train(10.0 * PunctuationRate(classes, rate) + 0.0 * ReferenceKL())
    found = curve(pulled, "rollout_PunctuationRate")
    assert found[-1] < 0.2 * found[0]
    assert len(curve(pulled, "rollout_cosine")) == 29  # the first step watches
    assert max(curve(pulled, "rollout_cosine")) > 0.2
    resumed = train(10.0 * PunctuationRate(classes, rate) + 0.0 * ReferenceKL(), str(tmp_path / "out/checkpoint-20"))
    assert curve(resumed, "rollout_PunctuationRate")[-10:] == pytest.approx(found[-10:], rel=1e-3)
    held = train(10.0 * PunctuationRate(classes, rate) + 30.0 * ReferenceKL(), save_strategy="no")
    moved = [float(one.own_text.terms.terms.means(one.own_text.terms.terms.split(one.own_text.terms.running))[1][0])
             for one in (pulled, held)]  # fmt: skip
    assert moved[1] < 0.5 * moved[0]  # the mean KL


def test_whole_texts_become_like_peoples(store: Any, tmp_path: Path) -> None:
    """What no row knows, moved by the score alone; resumed or not."""
    options = {"max_steps": 40, "learning_rate": 5e-3, "terms_decay": 0.5, "per_device_train_batch_size": 8,
               "hard_weight": 0.0, "soft_weight": 0.0, "rollout_length": 6, "rollout_samples": 4,
               "save_strategy": "steps", "save_steps": 30}  # fmt: skip

    def train(checkpoint: str | None = None) -> list[float]:
        data = {"train_dataset": store, "data_collator": plain, "processing_class": TOKENIZER}
        term = 20.0 * TextMMD(early, NAMES[1:9])
        trainer = DFTTrainer(sharp(), config(tmp_path, **options), None, rollout_terms=term, **data)
        trainer.train(resume_from_checkpoint=checkpoint)
        return curve(trainer, "rollout_TextMMD")

    def plain(items: Any) -> Any:
        return {name: store.collate(items)[name] for name in ("input_ids", "attention_mask", "labels")}

    found = train()
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    assert train(str(tmp_path / "out/checkpoint-30"))[-5:] == pytest.approx(found[-5:], rel=1e-3)


def test_stop_at_the_floor(store: Any, tmp_path: Path) -> None:
    far = TokenL2(torch.eye(64)[40])
    options = {"max_steps": 200, "learning_rate": 2e-2, "terms_decay": 0.5, "stop_at_floor": True, "soft_weight": 0.0,
               "hard_weight": 0.0}  # fmt: skip
    bounded = AtMost(far, bound=0.4, gain=0.4, rate=0.5, most=100.0)
    trainer = DFTTrainer(tiny(), config(tmp_path, **options), store, terms=bounded)
    trainer.train()
    ratios, duals = curve(trainer, "term_TokenL2_over_bound"), curve(trainer, "term_TokenL2_dual")
    assert 2 < trainer.state.global_step < 200
    assert ratios[0] > 1
    assert ratios[-1] <= 1
    assert duals[0] == 0  # of fewer steps than the means look back on
    assert duals[1] > 0
    with pytest.raises(ValueError, match="stop_at_floor must come with AtMost among the terms, got none"):
        DFTTrainer(tiny(), config(tmp_path, **options), store, terms=far)


def test_adapters_are_their_own_reference() -> None:
    model = peft.get_peft_model(
        sharp(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    reference = Reference(model)
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    rows = reference(given)
    z = rows.hidden @ rows.weight.t()
    with torch.no_grad():
        torch.testing.assert_close(z, sharp().eval()(**given).logits, rtol=1e-4, atol=1e-5)
        assert float((model(**given).logits - z).abs().max()) > 0.01


@pytest.mark.parametrize(("options", "terms", "said"), [
    ({"rollout_samples": 1}, Entropy(value=1.0), "rollouts must be 4 a batch or more"),
    ({"rollout_length": 1}, Entropy(value=1.0), "rollout_length must be an int of at least 2, got 1"),
    ({"rollout_temperature": 0.0}, Entropy(value=1.0), "temperature must be a number above 0"),
    ({}, Entropy(calibration=True), "without calibration on the model's own text"),
    ({}, TextMMD(early, ["word1"]), "processing_class must be the tokenizer, for a TextMMD, got NoneType"),
    ({"rollout_biased_without_score": True}, TextMMD(early, ["word1"]), "be False with a TextMMD, which is all score"),
])  # fmt: skip
def test_errors(options: Any, terms: Any, said: str, store: Any, tmp_path: Path) -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=said):
        DFTTrainer(model, config(tmp_path, **options), store, rollout_terms=terms).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
