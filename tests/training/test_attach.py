"""`attach`: any causal LM's own forward with the fused loss in it, and everything else as it was."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny_models import IDS, tiny
from walk_models import TINY, assert_same, gradients

import dft_kernels
from dft_kernels.models.heads import head_of, hidden_states
from dft_kernels.training.attach import attach, detach


@pytest.mark.parametrize("kind", ["cpmant", "trocr"])
def test_a_loss_that_is_not_the_next_tokens_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="must have the next token's cross-entropy as its loss"):
        attach(tiny(kind))


def masked() -> dict[str, torch.Tensor]:
    """A batch padded on the right and one on the left, in one."""
    mask = torch.ones_like(IDS)
    mask[0, 8:] = 0
    mask[1, :3] = 0
    return {"input_ids": IDS, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("labelled", [True, False])
def test_a_teacher(labelled: bool) -> None:
    """Row (b, t) of the teacher against row (b, t) of the model, where there is a token t + 1."""
    model, teacher, batch = tiny(), tiny(hidden_size=24), masked()
    with torch.no_grad():
        live = dft_kernels.TeacherHead(
            hidden_states(teacher, batch["input_ids"], batch["attention_mask"]), head_of(teacher).weight
        )
        log_p = teacher(input_ids=IDS, attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    weights = {"hard_weight": 0.3} if labelled else {}
    z = model(input_ids=IDS, attention_mask=batch["attention_mask"]).logits
    counts = batch["labels"][:, 1:] != -100
    log_q = z[:, :-1].log_softmax(-1)
    soft = (log_q.exp() * (log_q - log_p[:, :-1])).sum(-1)
    expected = soft[counts].mean()
    if labelled:
        expected = expected + 0.3 * torch.nn.functional.cross_entropy(log_q[counts], batch["labels"][:, 1:][counts])
    attach(model, divergence="reverse_kl", **weights)
    given = batch if labelled else {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = model(**given, teacher=live)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert out.metrics.soft_loss.shape == (2, 12)
    assert_same(gradients(model, out.loss), gradients(model, expected))
    plain = model(**batch).loss  # no teacher: the cross-entropy, not 0.3 of it
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(log_q[counts], batch["labels"][:, 1:][counts]))


def test_weights_of_one_call() -> None:
    model, teacher = attach(tiny(), hard_weight=0.3), torch.randn(2, 12, 64)
    out = model(**masked(), teacher=teacher, soft_weight=0.2, hard_weight=0.9)
    count = (masked()["labels"][:, 1:] != -100).sum()
    soft, hard = out.metrics.soft_loss.sum() / count, out.metrics.hard_loss.sum() / count
    torch.testing.assert_close(out.loss.detach(), 0.2 * soft + 0.9 * hard)
    torch.testing.assert_close(model(**masked(), teacher=teacher).loss.detach(), soft + 0.3 * hard)  # attach's again
    with pytest.raises(ValueError, match=r"teacher must be given with hard_weight=0.5 in a call, got None"):
        model(**masked(), hard_weight=0.5)


def test_accumulation_is_the_batch() -> None:
    """Gradients of one step of 4 sequences, and of 4 of one, divided by the tokens of all."""
    model = attach(tiny())
    ids = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    for row, count in enumerate((9, 1, 5, 10)):
        labels[row, count:] = -100
    items = (labels[:, 1:] != -100).sum()
    whole = gradients(model, model(input_ids=ids, labels=labels, num_items_in_batch=items).loss)
    for items_of_one in (items, int(items)):
        losses = [
            model(input_ids=i, labels=n, num_items_in_batch=items_of_one).loss
            for i, n in zip(ids.split(1), labels.split(1), strict=True)
        ]
        assert_same(gradients(model, sum(losses)), whole)
    out = model(input_ids=ids, labels=torch.full_like(labels, -100), num_items_in_batch=items)
    assert float(out.loss.detach()) == 0.0


def test_packed_sequences_and_shifted_labels() -> None:
    model = tiny()
    positions = torch.arange(12).repeat(2, 1) % 5
    shifted = torch.nn.functional.pad(IDS, (0, 1), value=-100)[:, 1:].masked_fill(positions == 4, -100)
    plain = model(input_ids=IDS, position_ids=positions, labels=IDS, shift_labels=shifted).loss
    expected = gradients(model, plain)
    fused = attach(model)(input_ids=IDS, position_ids=positions, shift_labels=shifted).loss
    torch.testing.assert_close(fused, plain)
    assert_same(gradients(model, fused), expected)


def test_everything_else_is_untouched(tmp_path: Any) -> None:
    model = tiny().eval()
    with torch.no_grad():
        before = model(input_ids=IDS, labels=IDS), model(input_ids=IDS, logits_to_keep=1)
        said = model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS))
        attach(model)
        after = model(input_ids=IDS, labels=IDS), model(input_ids=IDS, logits_to_keep=1)
        assert torch.equal(
            said, model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS))
        )
    for one, other in zip(before, after, strict=True):
        assert list(one.keys()) == list(other.keys())
        assert torch.equal(one.logits, other.logits)
    assert {"input_ids", "labels", "teacher", "num_items_in_batch"} <= set(inspect.signature(model.forward).parameters)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "forward" not in loaded.__dict__
    torch.testing.assert_close(loaded(input_ids=IDS).logits, before[0].logits)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(input_ids=IDS, labels=IDS).loss.detach()) == pytest.approx(4.1588830, rel=1e-6)  # log 64: its own
    detach(model)
    assert "forward" not in model.__dict__
    assert model.train()(input_ids=IDS, labels=IDS).logits is not None


def test_a_forward_that_was_there_is_given_back() -> None:
    model = tiny()
    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k)
    replaced = model.forward
    detach(attach(model))
    assert model.forward is replaced


def test_trainer_takes_the_same_steps(tmp_path: Any) -> None:
    rows = [{"input_ids": IDS[n % 2].roll(n), "labels": IDS[n % 2].roll(n)} for n in range(16)]
    curves = []
    for fused in (False, True):
        model = tiny()
        if fused:
            attach(model)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows[:4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Trainer's own
            trainer.train()
            found = trainer.evaluate()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [found["eval_loss"]])
    assert len(curves[0]) == 5
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, by PEFT
def test_lora_on_the_backbone_leaves_the_head_alone() -> None:
    import peft

    losses, found = [], []
    for fused in (False, True):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(tiny(), lora)
        if fused:
            attach(wrapped)
        out = wrapped(input_ids=IDS, labels=IDS)
        losses.append(out.loss.detach())
        found.append(gradients(wrapped, out.loss))
    torch.testing.assert_close(*losses)
    assert_same(*found)
    assert all("lora" in name for name in found[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, by PEFT
def test_a_head_among_modules_to_save_is_trained() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(tiny(tie_word_embeddings=False), config)
    expected = gradients(wrapped, wrapped(input_ids=IDS, labels=IDS).loss)
    found = gradients(wrapped, attach(wrapped)(input_ids=IDS, labels=IDS).loss)
    assert_same(found, expected)
    assert any("lm_head" in name for name in found)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied heads
def test_lora_on_the_head_is_trained(kind: str, tied: bool) -> None:
    """Two adapters on the head and one on the backbone; disabled and merged they are what PEFT makes of them."""
    import peft

    lora = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(tiny(kind, tie_word_embeddings=tied), peft.LoraConfig(r=3, lora_alpha=5, **lora))
    wrapped.add_adapter("second", peft.LoraConfig(r=2, use_rslora=True, **lora))
    wrapped.base_model.set_adapter(["default", "second"])
    teacher = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1))
    plain = wrapped(input_ids=IDS, labels=IDS)
    expected = gradients(wrapped, plain.loss)
    assert sum("lm_head" in name for name in expected) == 4
    attach(wrapped, hard_weight=0.0)
    fused = wrapped(input_ids=IDS, labels=IDS, return_logits=True)
    torch.testing.assert_close(fused.loss, plain.loss)
    torch.testing.assert_close(fused.logits, plain.logits)
    assert_same(gradients(wrapped, fused.loss), expected)
    soft = wrapped(input_ids=IDS, labels=IDS, teacher=teacher).loss
    log_q, log_p = plain.logits[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1)
    kl = wrapped.get_base_model().train()(input_ids=IDS, labels=IDS, teacher=teacher).loss
    assert torch.equal(kl, soft)
    torch.testing.assert_close(soft, (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    for state in ("disabled", "merged"):
        if state == "merged":
            wrapped.merge_adapter()
        with wrapped.disable_adapter() if state == "disabled" else torch.no_grad():
            logits = wrapped(input_ids=IDS).logits
            loss = wrapped(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), IDS[:, 1:].reshape(-1))
        )


@pytest.mark.filterwarnings("ignore")
def test_lora_dropout_is_that_of_the_forward() -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny(), config)
    losses = []
    for fused in (False, True):
        if fused:
            attach(wrapped)
        torch.manual_seed(5)
        losses.append(wrapped(input_ids=IDS, labels=IDS).loss.detach())
    torch.testing.assert_close(*losses)


@pytest.mark.filterwarnings("ignore")
def test_other_adapters_on_the_head_are_refused() -> None:
    import peft

    for config, said in (
        (peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), "got DoraLinearVariant"),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "got Linear"),
    ):
        with pytest.raises(
            ValueError, match=f"must have a plain lm_head, or one adapted by LoRA or trainable tokens, {said}"
        ):
            attach(peft.get_peft_model(tiny(tie_word_embeddings=False), config))
    lora = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="must have a plain lm_head, got one with an adapter"):
        head_of(lora)  # a teacher's


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [[3, 5, 9], {"lm_head": [3, 5]}, {"embed_tokens": [3, 5], "lm_head": [7, 9]}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_trainable_tokens_of_the_head(rows: Any, tied: bool) -> None:
    """Rows of the head, and those of a tied embedding; disabled and merged they are what PEFT makes of them."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny("gemma2", tie_word_embeddings=tied), config)
    deltas = [p for name, p in wrapped.named_parameters() if "trainable_tokens_delta" in name]
    with torch.no_grad():
        for delta in deltas:
            delta += torch.randn(delta.shape, generator=torch.Generator().manual_seed(1))
    plain = wrapped(input_ids=IDS, labels=IDS)
    expected = gradients(wrapped, plain.loss)
    assert sum("trainable_tokens_delta" in name for name in expected) == len(deltas)
    fused = attach(wrapped)(input_ids=IDS, labels=IDS, return_logits=True)
    torch.testing.assert_close(fused.loss, plain.loss)
    torch.testing.assert_close(fused.logits, plain.logits)
    assert_same(gradients(wrapped, fused.loss), expected)
    for state in ("disabled", "merged"):
        if state == "merged":
            wrapped.merge_adapter()
        with wrapped.disable_adapter() if state == "disabled" else torch.no_grad():
            logits = wrapped(input_ids=IDS).logits
            loss = wrapped(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), IDS[:, 1:].reshape(-1))
        )


def test_a_frozen_backbone() -> None:
    model = tiny(tie_word_embeddings=False)
    model.base_model.requires_grad_(False)
    expected = gradients(model, model(input_ids=IDS, labels=IDS).loss)
    assert set(expected) == {"lm_head.weight"}
    assert_same(gradients(model, attach(model)(input_ids=IDS, labels=IDS).loss), expected)


def test_mistakes() -> None:
    model = tiny()
    with pytest.raises(
        TypeError, match=r"attach: divergense must be a keyword that it takes, .* Did you mean divergence"
    ):
        attach(model, divergense="reverse_kl")
    for wrong, message in (
        ({"divergence": "kl"}, "attach: divergence must be one of forward_kl"),
        ({"temperature": 0.0}, "attach: temperature must be greater than 0"),
        ({"backend": "gpu"}, "attach: backend must be one of auto"),
        ({"teacher": IDS}, "attach: teacher must be given in each call"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, **wrong)
    detach(attach(model, backend="cuda", logits_dtype=torch.bfloat16))  # of tensors that are not there yet
    with pytest.raises(ValueError, match=r"attach: softcap must be left to the model"):
        attach(model, softcap=3.0)
    with pytest.raises(ValueError, match=r"attach: model must be a causal LM of transformers, got Linear"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"attach: model must be attached"):
        detach(model)
    attach(model, hard_weight=0.2)
    with pytest.raises(ValueError, match=r"Call detach\(model\) first"):
        attach(model)
    teacher = torch.zeros(2, 12, 64)
    with pytest.raises(ValueError, match=r"labels must be given with hard_weight=0.2"):
        model(input_ids=IDS, teacher=teacher)
    with pytest.raises(ValueError, match=r"labels must be given with inputs_embeds"):
        detach(model) and attach(model)(inputs_embeds=torch.zeros(2, 12, 16), teacher=teacher)
    for kind in ("t5", "bart"):
        torch.manual_seed(0)
        seq2seq = transformers.AutoModelForSeq2SeqLM.from_config(transformers.CONFIG_MAPPING[kind](**TINY))
        with pytest.raises(
            ValueError, match=r"must be a causal LM of transformers, got \w+, an encoder-decoder\. Pass"
        ):
            attach(seq2seq)
