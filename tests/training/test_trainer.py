"""`DFTTrainer`: Trainer's loop with a teacher, and the metrics of the loss's own pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny
from training_runs import config, curve, teacher, top_k_store

import dft_kernels
from dft_kernels import Labels, Mixture
from dft_kernels.models.heads import hidden_states
from dft_kernels.store.reader import Store
from dft_kernels.testing import dense_loss
from dft_kernels.training.collators import PrinciplesCollator
from dft_kernels.training.trainer import DFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


def test_a_store_a_running_teacher_and_a_function_are_one(store: Store, tmp_path: Path) -> None:
    model = teacher()

    def function(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    curves = []
    for given in (store, teacher(), function):
        more = {} if given is store else {"train_dataset": store, "data_collator": store.collate}
        trainer = DFTTrainer(tiny(), config(tmp_path, max_steps=12), given, **more)
        trainer.train()
        curves.append(curve(trainer))
        soft = curve(trainer, "soft_loss")
        assert sum(soft[8:]) < sum(soft[:4])
    assert curves[1] == pytest.approx(curves[2], rel=1e-5)
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)  # hidden states in bf16


def test_the_first_step_is_the_formula(store: Store, tmp_path: Path) -> None:
    options = config(
        tmp_path, max_steps=1, per_device_train_batch_size=8, divergence="jensen_shannon", soft_weight=0.7,
        hard_weight=0.3, temperature=2.0, temperature_scaling="squared",
    )  # fmt: skip
    trainer = DFTTrainer(tiny(), options, store)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "soft_loss" in entry]
    model, batch = tiny(), store.batch(range(8))
    labels = dft_kernels.shift_labels(batch["labels"])
    with torch.no_grad():
        hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        given = store.teacher(batch)
        exact = dense_loss(
            hidden, model.get_output_embeddings().weight, labels, given, divergence="jensen_shannon", soft_weight=0.7,
            hard_weight=0.3, temperature=2.0, temperature_scaling="squared",
        )  # fmt: skip
        z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    valid = labels != -100
    log_q = z.log_softmax(-1)[valid]
    assert logged["loss"] == pytest.approx(float(exact), rel=1e-3)
    assert logged["hard_loss"] == pytest.approx(float(torch.nn.functional.nll_loss(log_q, labels[valid])), rel=1e-4)
    assert logged["entropy"] == pytest.approx(float(-(log_q.exp() * log_q).sum(-1).mean()), rel=1e-4)
    assert logged["accuracy"] == pytest.approx(float((log_q.argmax(-1) == labels[valid]).float().mean()))
    assert 0 <= logged["teacher_agreement"] <= 1
    assert logged["loss"] == pytest.approx(0.7 * logged["soft_loss"] + 0.3 * logged["hard_loss"], rel=1e-3)


def test_resumed_it_is_the_same_curve(store: Store, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = DFTTrainer(tiny(), config(tmp_path, **options), store)
    whole.train()
    resumed = DFTTrainer(tiny(), config(tmp_path, **options), store)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert curve(resumed)[2:] == pytest.approx(curve(whole)[2:], rel=1e-6)
    assert curve(resumed, "soft_loss")[2:] == pytest.approx(curve(whole, "soft_loss")[2:], rel=1e-6)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    assert "forward" not in loaded.__dict__


def test_a_gradient_error_is_kept_and_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dft_kernels.backends.active.PREPARES", 0)
    exact = DFTTrainer(tiny(), config(tmp_path, max_steps=2, logging_steps=1), store)
    exact.train()
    trainer = DFTTrainer(tiny(), config(tmp_path, max_steps=2, logging_steps=1, loss_gradient_error=0.2), store)
    trainer.train()
    for name in ("dropped", "active_columns"):
        assert not curve(exact, name)
    assert all(0 < dropped <= 0.2 for dropped in curve(trainer, "dropped"))
    assert all(active < 1 for active in curve(trainer, "active_columns"))
    assert curve(trainer, "soft_loss")[0] == curve(exact, "soft_loss")[0]
    norms = [curve(one, "grad_norm")[0] for one in (trainer, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=0.2)
    assert norms[0] != norms[1]
    with pytest.raises(ValueError, match=r"^DFTConfig: gradient_error must be None or lie between"):
        config(tmp_path, loss_gradient_error=2.0)


def test_the_bar_shows_the_metrics(store: Store, tmp_path: Path, capsys: Any) -> None:
    seen: list[str] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            bars = [one for one in trainer.callback_handler.callbacks if isinstance(one, transformers.ProgressCallback)]
            assert len(bars) == 1
            seen.append(bars[0].training_bar.postfix or "")

    trainer = DFTTrainer(
        tiny(), config(tmp_path, max_steps=3, matching_from=1, disable_tqdm=False), store, callbacks=[Watch()]
    )
    trainer.train()
    first, second = (e for e in trainer.state.log_history[:2])
    assert seen == [
        "",
        f"loss={first['loss']:.4g}, hard_loss={first['hard_loss']:.4g}",
        ", ".join(f"{n}={second[n]:.4g}" for n in ("loss", "soft_loss", "hard_loss", "teacher_agreement")),
    ]
    assert capsys.readouterr().out.count("'soft_loss'") == 2  # Trainer's lines, once each


def test_without_a_bar_or_on_another_process_there_is_none(store: Store, tmp_path: Path) -> None:
    quiet = DFTTrainer(tiny(), config(tmp_path), store)
    assert not any(isinstance(one, transformers.ProgressCallback) for one in quiet.callback_handler.callbacks)
    other = DFTTrainer(tiny(), config(tmp_path, max_steps=1, disable_tqdm=False), store)
    other.state.is_world_process_zero = False
    other.is_world_process_zero = lambda: False
    other.train()
    (bar,) = [one for one in other.callback_handler.callbacks if isinstance(one, transformers.ProgressCallback)]
    assert bar.training_bar is None
    other.log({"loss": 1.0})  # after the last step there is no bar


def test_a_loss_that_is_not_finite_is_named(store: Store, tmp_path: Path) -> None:
    def function(inputs: dict[str, Any]) -> Any:
        return torch.full((*inputs["input_ids"].shape, 64), math.nan if trainer.state.global_step == 1 else 0.0)

    model = tiny()
    trainer = DFTTrainer(model, config(tmp_path), function, train_dataset=store, data_collator=store.collate)
    with pytest.raises(ValueError, match=r"loss must be finite, got nan in step 2, sequences \[\d, \d\]"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_evaluation_is_trainers(store: Store, tmp_path: Path) -> None:
    plain, model = tiny(), tiny()
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False
    )

    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = store.collate(items)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    expected = transformers.Trainer(plain, options, data_collator=collate, eval_dataset=store).evaluate()
    found = DFTTrainer(model, config(tmp_path), store, eval_dataset=store).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_mistakes(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DFTConfig: matching_every must be an int of at least 1, got 0"):
        config(tmp_path, matching_every=0)
    with pytest.raises(ValueError, match="DFTConfig: matching_ramp must be an int of at least 0, got -1"):
        config(tmp_path, matching_ramp=-1)
    with pytest.raises(ValueError, match=r"DFTConfig: matching_ramp must be an int of at least 0, got 0\.5"):
        config(tmp_path, matching_ramp=0.5)
    with pytest.raises(ValueError, match=r"DFTConfig: label_smoothing_factor must be 0, got 0\.1"):
        config(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="DFTTrainer: compute_loss_func must be None"):
        DFTTrainer(tiny(), config(tmp_path), store, compute_loss_func=lambda *given: 0.0)
    strange = DFTTrainer(tiny(), config(tmp_path), store, train_dataset=[{"input_ids": [3, 4], "labels": [3, 4]}] * 2)
    with pytest.raises(ValueError, match=r"batches must have the store's rows \(hidden\), got only input_ids, labels"):
        strange.train()
    with pytest.raises(TypeError, match="args must be a DFTConfig, got TrainingArguments"):
        DFTTrainer(tiny(), transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), store)


def test_mistakes_in_the_teacher_and_the_loss_come_at_construction(store: Store, tmp_path: Path) -> None:
    sparse = top_k_store(tmp_path / "sparse")
    collator = PrinciplesCollator([5, 6])
    cases: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
        (torch.zeros(2, 3, 64), {}, {}, "teacher must be a Store, a model, a function of the batch, or a Mixture"),
        (torch.nn.Linear(2, 2), {}, {}, "teacher must be a causal LM of transformers where it is a module, got Linear"),
        (Labels(), {}, {}, "teacher must be a Store, .*got Labels"),
        (Mixture([store, store], [0.5, 0.5]), {}, {}, "teacher must hold one Store at most"),
        (Mixture([Mixture([store], [1.0])], [1.0]), {}, {}, "Multiply the weights out"),
        (Mixture([store, Labels()], [0.5, 0.6]), {}, {}, "DFTTrainer: Mixture weights must sum to 1"),
        (Mixture([store, Labels()], [0.5, 0.5], "log_linear"), {}, {}, r"Labels\(\) must come with target in a linear"),
        (Mixture([sparse, Labels()], [0.5, 0.5]), {}, {}, "teacher must hold no store of a top k as such in a Mixture"),
        (sparse, {"temperature": 2.0}, {}, "DFTTrainer: teacher_temperature must be 1.0"),
        (store, {"divergence": "kl"}, {}, "DFTConfig: divergence must be one of forward_kl"),
        (store, {"loss_backend": "gpu"}, {}, "DFTConfig: backend must be one of auto"),
        (tiny(vocab_size=65), {}, {}, "teacher must have the model's vocabulary of 64, got a vocabulary of 65"),
        (store, {}, {"data_collator": collator}, "teacher must be a model, .*got a Store, whose rows are there"),
        (None, {}, {"data_collator": collator}, "teacher must be a model, .*got none that could be run"),
        (Mixture([store, teacher()], [0.5, 0.5]), {}, {"data_collator": collator}, "teacher must be a model"),
    ]
    for given, changes, more, message in cases:
        model = tiny()
        with pytest.raises((ValueError, TypeError), match=message):
            DFTTrainer(model, config(tmp_path, **changes), given, **more)
        assert "forward" not in model.__dict__  # nothing was attached
    with pytest.raises(ValueError, match="teacher must be another model than the one that is trained"):
        DFTTrainer(model, config(tmp_path), model)
    with pytest.raises(ValueError, match="teacher must have the model's vocabulary of 65, got a vocabulary of 64"):
        DFTTrainer(tiny(vocab_size=65), config(tmp_path), store)
