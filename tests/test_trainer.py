"""`DFTTrainer`: Trainer's loop with a teacher, and the metrics of the loss's own pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dft_kernels
from dft_kernels.finetune.heads import head_of, hidden_states
from dft_kernels.targets.manifest import Contents
from dft_kernels.targets.store import Store
from dft_kernels.targets.writer import StoreWriter
from dft_kernels.testing import dense_loss

transformers = pytest.importorskip("transformers")
from test_attach import tiny  # noqa: E402 - imports transformers

from dft_kernels.finetune.trainer import DFTConfig, DFTTrainer  # noqa: E402 - the same

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own
LENGTHS = (9, 4, 12, 7, 5, 12, 3, 8)


def teacher() -> Any:
    model = tiny(hidden_size=24).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    return model.to(torch.bfloat16).float()  # weights that bf16 holds


def written(folder: Path) -> Store:
    """A store of hidden states, written by hand in bf16."""
    model, head = teacher(), head_of(teacher())
    assert head.weight is not None
    contents = Contents("hidden", 64, 24, "tiny", "a", "b")
    with StoreWriter(folder / "store", contents, (head.weight, None)) as writer:
        ids = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
        with torch.no_grad():
            writer.append(ids, hidden=[hidden_states(model, one[None])[0] for one in ids])
    return Store(folder / "store")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return written(tmp_path)


def config(tmp_path: Path, **changes: Any) -> DFTConfig:
    plain: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return DFTConfig(**{**plain, **changes})


def curve(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


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


def test_accumulation_is_the_batch(store: Store, tmp_path: Path) -> None:
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        options = config(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        model = tiny()
        DFTTrainer(model, options, store).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    begun = dict(tiny().named_parameters())
    for name, one in weights[0].items():
        assert not torch.equal(one, begun[name])
        torch.testing.assert_close(weights[1][name] - begun[name], one - begun[name], rtol=2e-3, atol=1e-6)


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


def test_steps_of_matching_alternate(store: Store, tmp_path: Path) -> None:
    asked: list[int] = []

    def function(inputs: dict[str, Any]) -> Any:
        asked.append(trainer.state.global_step)
        return torch.zeros(*inputs["input_ids"].shape, 64)

    options = config(tmp_path, max_steps=8, matching_every=3, matching_from=1, gradient_accumulation_steps=2)
    trainer = DFTTrainer(tiny(), options, function, train_dataset=store, data_collator=store.collate)
    trainer.train()
    assert asked == [3, 3, 6, 6]
    logged = [entry["step"] - 1 for entry in trainer.state.log_history if "soft_loss" in entry]
    assert logged == [3, 6]


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
    with pytest.raises(ValueError, match="DFTConfig: matching_every must be at least 1, got 0"):
        config(tmp_path, matching_every=0)
    with pytest.raises(TypeError, match="args must be a DFTConfig, got TrainingArguments"):
        DFTTrainer(tiny(), transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), store)
